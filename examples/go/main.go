// Parley from Go: the story that each example here tells.
package main

import (
	"context"
	"fmt"
	"log"
	"os"
	"strings"
	"time"

	"github.com/google/uuid"
	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	_ "google.golang.org/grpc/health" // healthCheckConfig of the policy: no calls to a server that drains
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	parley "parley/examples/go/gen/parley/v1"
)

const deadline = 10 * time.Second // of one call, with its retries

func main() {
	log.SetFlags(0)
	conn, err := connect()
	if err != nil {
		log.Fatal(err)
	}
	defer conn.Close()

	run := uuid.NewString()[:8]
	story := &story{
		users:         parley.NewUserServiceClient(conn),
		conversations: parley.NewConversationServiceClient(conn),
		participants:  parley.NewParticipantServiceClient(conn),
		messages:      parley.NewMessageServiceClient(conn),
		events:        parley.NewEventServiceClient(conn),
		ada:           "ada-" + run,
		ben:           "ben-" + run,
		slug:          "lunch-" + run,
	}
	if err := story.tell(context.Background()); err != nil {
		log.Fatal(err)
	}
}

func connect() (*grpc.ClientConn, error) {
	// Which calls are made again, and when: published with the protos, carried out by gRPC.
	serviceConfig, err := os.ReadFile("../../clients/service-config.json")
	if err != nil {
		return nil, err
	}
	return grpc.NewClient(
		os.Getenv("PARLEY_ADDRESS"),
		grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithDefaultServiceConfig(string(serviceConfig)),
		grpc.WithUnaryInterceptor(withDeadline),
	)
}

// withDeadline bounds a unary call; a stream lasts as long as it is wanted.
func withDeadline(ctx context.Context, method string, request, reply any, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, options ...grpc.CallOption) error {
	ctx, cancel := context.WithTimeout(ctx, deadline)
	defer cancel()
	return invoke(ctx, method, request, reply, conn, options...)
}

// actingAs says who calls, and for which user; for none, the caller is the system.
func actingAs(ctx context.Context, actor string) context.Context {
	ctx = metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+os.Getenv("PARLEY_TOKEN"))
	if actor != "" {
		ctx = metadata.AppendToOutgoingContext(ctx, "x-parley-actor", actor)
	}
	return ctx
}

// reason is why the server refused a call, to branch on; empty where it did not say.
func reason(err error) string {
	for _, detail := range status.Convert(err).Details() {
		if info, ok := detail.(*errdetails.ErrorInfo); ok {
			return info.Reason
		}
	}
	return ""
}

type story struct {
	users          parley.UserServiceClient
	conversations  parley.ConversationServiceClient
	participants   parley.ParticipantServiceClient
	messages       parley.MessageServiceClient
	events         parley.EventServiceClient
	ada, ben, slug string
}

func (s *story) tell(ctx context.Context) error {
	chapters := []func(context.Context) error{s.meet, s.invite, s.talk, s.collide, s.pageBack, s.follow}
	for _, chapter := range chapters {
		if err := chapter(ctx); err != nil {
			return err
		}
	}
	return nil
}

// meet makes two users, which only the system may, and a conversation of one of them.
func (s *story) meet(ctx context.Context) error {
	for _, username := range []string{s.ada, s.ben} {
		_, err := s.users.CreateUser(actingAs(ctx, ""), &parley.CreateUserRequest{
			User:      &parley.User{Username: username},
			RequestId: uuid.NewString(),
		})
		if err != nil {
			return err
		}
	}
	fmt.Printf("users: %s and %s\n", s.ada, s.ben)

	if err := s.create(ctx, s.slug); err != nil {
		return err
	}
	fmt.Printf("conversation: %s\n", s.slug)
	return nil
}

func (s *story) create(ctx context.Context, slug string) error {
	_, err := s.conversations.CreateConversation(actingAs(ctx, s.ada), &parley.CreateConversationRequest{
		Conversation: &parley.Conversation{Slug: slug, Title: "Lunch"},
		RequestId:    uuid.NewString(),
	})
	return err
}

// invite brings Ben in: Ada asks, he accepts.
func (s *story) invite(ctx context.Context) error {
	invited, err := s.participants.InviteParticipant(actingAs(ctx, s.ada), &parley.InviteParticipantRequest{
		ConversationId: s.slug,
		UserId:         s.ben,
		RequestId:      uuid.NewString(),
	})
	if err != nil {
		return err
	}
	fmt.Printf("invited: %s\n", invited.Participant.Status)

	accepted, err := s.participants.AcceptInvitation(actingAs(ctx, s.ben), &parley.AcceptInvitationRequest{
		ConversationId: s.slug,
		RequestId:      uuid.NewString(),
	})
	if err != nil {
		return err
	}
	fmt.Printf("accepted: %s\n", accepted.Participant.Status)
	return nil
}

// talk sends a message twice under one request_id, as if the answer had been lost: it is one.
func (s *story) talk(ctx context.Context) error {
	requestID := uuid.NewString()
	first, err := s.send(ctx, s.ada, "Lunch?", requestID)
	if err != nil {
		return err
	}
	again, err := s.send(ctx, s.ada, "Lunch?", requestID)
	if err != nil {
		return err
	}
	fmt.Printf("sent: %d %s\n", first.Sequence, first.Content)
	fmt.Printf("sent again: %d %s\n", again.Sequence, again.Content)

	for _, line := range [][2]string{{s.ben, "At one."}, {s.ada, "Where?"}, {s.ben, "The usual place."}, {s.ada, "See you."}} {
		if _, err := s.send(ctx, line[0], line[1], uuid.NewString()); err != nil {
			return err
		}
	}
	return nil
}

func (s *story) send(ctx context.Context, sender, content, requestID string) (*parley.Message, error) {
	response, err := s.messages.SendMessage(actingAs(ctx, sender), &parley.SendMessageRequest{
		ConversationId: s.slug,
		Role:           parley.Message_ROLE_USER,
		Content:        content,
		RequestId:      requestID,
	})
	return response.GetMessage(), err
}

// collide asks for a slug that is taken: the status tells the kind of error, the reason which.
func (s *story) collide(ctx context.Context) error {
	err := s.create(ctx, s.slug)
	if reason(err) != "SLUG_TAKEN" {
		return fmt.Errorf("%s was given twice: %w", s.slug, err)
	}
	other := s.slug + "-2"
	if err := s.create(ctx, other); err != nil {
		return err
	}
	fmt.Printf("refused: %s, so %s\n", reason(err), other)
	return nil
}

// pageBack reads from the newest message to the first; the last page has no next_page_token.
func (s *story) pageBack(ctx context.Context) error {
	request := &parley.ListMessagesRequest{ConversationId: s.slug, PageSize: 2}
	for {
		page, err := s.messages.ListMessages(actingAs(ctx, s.ada), request)
		if err != nil {
			return err
		}
		var lines []string
		for _, message := range page.Messages {
			lines = append(lines, fmt.Sprintf("%d %s", message.Sequence, message.Content))
		}
		fmt.Printf("page: %s\n", strings.Join(lines, " | "))
		if page.NextPageToken == "" {
			return nil
		}
		request.PageToken = page.NextPageToken
	}
}

// follow watches from the first event on, is cut off, and goes on from its cursor.
func (s *story) follow(ctx context.Context) error {
	request := &parley.WatchRequest{
		Scope: &parley.WatchRequest_ConversationId{ConversationId: s.slug},
		Start: &parley.WatchRequest_Oldest{Oldest: true},
	}

	watching, cut := context.WithCancel(ctx)
	defer cut()
	stream, err := s.events.Watch(actingAs(watching, s.ada), request)
	if err != nil {
		return err
	}
	live, err := s.send(ctx, s.ben, "On my way.", uuid.NewString())
	if err != nil {
		return err
	}
	cursor, err := readUntil(stream, live)
	if err != nil {
		return err
	}
	cut()
	fmt.Println("cut")

	missed, err := s.send(ctx, s.ben, "Here I am.", uuid.NewString())
	if err != nil {
		return err
	}
	request.Start = &parley.WatchRequest_ResumeCursor{ResumeCursor: cursor}
	watching, cut = context.WithCancel(ctx)
	defer cut()
	stream, err = s.events.Watch(actingAs(watching, s.ada), request)
	if err != nil {
		return err
	}
	_, err = readUntil(stream, missed)
	return err
}

// readUntil prints events until the message has come. A cursor stands behind all events of its
// response: keep it only when they are dealt with.
func readUntil(stream grpc.ServerStreamingClient[parley.WatchResponse], message *parley.Message) (cursor string, err error) {
	for came := false; !came; {
		response, err := stream.Recv()
		if err != nil {
			return "", err
		}
		for _, event := range response.Events {
			fmt.Printf("event: %d %s\n", event.Version, event.Type)
			came = came || event.Sequence == message.Sequence
		}
		cursor = response.Cursor
	}
	return cursor, nil
}
