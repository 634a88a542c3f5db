package parley.example;

import com.google.gson.Gson;
import com.google.protobuf.Any;
import com.google.protobuf.InvalidProtocolBufferException;
import com.google.rpc.ErrorInfo;
import com.parley.v1.AcceptInvitationRequest;
import com.parley.v1.Conversation;
import com.parley.v1.ConversationServiceGrpc;
import com.parley.v1.CreateConversationRequest;
import com.parley.v1.CreateUserRequest;
import com.parley.v1.EventServiceGrpc;
import com.parley.v1.InviteParticipantRequest;
import com.parley.v1.ListMessagesRequest;
import com.parley.v1.Message;
import com.parley.v1.MessageServiceGrpc;
import com.parley.v1.ParticipantServiceGrpc;
import com.parley.v1.SendMessageRequest;
import com.parley.v1.User;
import com.parley.v1.UserServiceGrpc;
import com.parley.v1.WatchRequest;
import com.parley.v1.WatchResponse;
import io.grpc.CallOptions;
import io.grpc.Channel;
import io.grpc.ClientCall;
import io.grpc.ClientInterceptor;
import io.grpc.Context;
import io.grpc.Grpc;
import io.grpc.InsecureChannelCredentials;
import io.grpc.ManagedChannel;
import io.grpc.Metadata;
import io.grpc.MethodDescriptor;
import io.grpc.StatusRuntimeException;
import io.grpc.protobuf.StatusProto;
import io.grpc.stub.AbstractStub;
import io.grpc.stub.MetadataUtils;
import java.io.IOException;
import java.io.InputStreamReader;
import java.util.Iterator;
import java.util.Map;
import java.util.UUID;
import java.util.concurrent.TimeUnit;
import java.util.stream.Collectors;

/** Parley from Java: the story that each example here tells. */
public final class Main {
  /** Seconds, of one call with its retries. */
  private static final long DEADLINE = 10;

  public static void main(String[] args) throws Exception {
    var channel = connect();
    try {
      var story = new Main(channel, UUID.randomUUID().toString().substring(0, 8));
      story.meet();
      story.invite();
      story.talk();
      story.collide();
      story.pageBack();
      story.follow();
    } finally {
      channel.shutdown().awaitTermination(DEADLINE, TimeUnit.SECONDS);
    }
  }

  private static ManagedChannel connect() throws IOException {
    // Which calls are made again, and when: published with the protos, carried out by gRPC.
    try (var serviceConfig = Main.class.getResourceAsStream("/service-config.json")) {
      @SuppressWarnings("unchecked")
      Map<String, ?> policy = new Gson().fromJson(new InputStreamReader(serviceConfig), Map.class);
      return Grpc.newChannelBuilder(
              System.getenv("PARLEY_ADDRESS"), InsecureChannelCredentials.create())
          .defaultServiceConfig(policy)
          .intercept(new WithDeadline())
          .build();
    }
  }

  /** Bounds a unary call; a stream lasts as long as it is wanted. */
  private static final class WithDeadline implements ClientInterceptor {
    @Override
    public <Q, A> ClientCall<Q, A> interceptCall(
        MethodDescriptor<Q, A> method, CallOptions options, Channel next) {
      var unary = method.getType() == MethodDescriptor.MethodType.UNARY;
      return next.newCall(
          method, unary ? options.withDeadlineAfter(DEADLINE, TimeUnit.SECONDS) : options);
    }
  }

  /** Says who calls, and for which user; for none, the caller is the system. */
  private static <S extends AbstractStub<S>> S actingAs(String actor, S stub) {
    var metadata = new Metadata();
    metadata.put(key("authorization"), "Bearer " + System.getenv("PARLEY_TOKEN"));
    if (!actor.isEmpty()) {
      metadata.put(key("x-parley-actor"), actor);
    }
    return stub.withInterceptors(MetadataUtils.newAttachHeadersInterceptor(metadata));
  }

  private static Metadata.Key<String> key(String name) {
    return Metadata.Key.of(name, Metadata.ASCII_STRING_MARSHALLER);
  }

  /** Why the server refused a call, to branch on; empty where it did not say. */
  private static String reason(StatusRuntimeException error) throws InvalidProtocolBufferException {
    for (Any detail : StatusProto.fromThrowable(error).getDetailsList()) {
      if (detail.is(ErrorInfo.class)) {
        return detail.unpack(ErrorInfo.class).getReason();
      }
    }
    return "";
  }

  private final UserServiceGrpc.UserServiceBlockingStub users;
  private final ConversationServiceGrpc.ConversationServiceBlockingStub conversations;
  private final ParticipantServiceGrpc.ParticipantServiceBlockingStub participants;
  private final MessageServiceGrpc.MessageServiceBlockingStub messages;
  private final EventServiceGrpc.EventServiceBlockingStub events;
  private final String ada;
  private final String ben;
  private final String slug;

  private Main(Channel channel, String run) {
    users = UserServiceGrpc.newBlockingStub(channel);
    conversations = ConversationServiceGrpc.newBlockingStub(channel);
    participants = ParticipantServiceGrpc.newBlockingStub(channel);
    messages = MessageServiceGrpc.newBlockingStub(channel);
    events = EventServiceGrpc.newBlockingStub(channel);
    ada = "ada-" + run;
    ben = "ben-" + run;
    slug = "lunch-" + run;
  }

  /** Makes two users, which only the system may, and a conversation of one of them. */
  private void meet() {
    for (var username : new String[] {ada, ben}) {
      actingAs("", users)
          .createUser(
              CreateUserRequest.newBuilder()
                  .setUser(User.newBuilder().setUsername(username))
                  .setRequestId(freshId())
                  .build());
    }
    System.out.printf("users: %s and %s%n", ada, ben);

    create(slug);
    System.out.printf("conversation: %s%n", slug);
  }

  private void create(String slug) {
    actingAs(ada, conversations)
        .createConversation(
            CreateConversationRequest.newBuilder()
                .setConversation(Conversation.newBuilder().setSlug(slug).setTitle("Lunch"))
                .setRequestId(freshId())
                .build());
  }

  /** Brings Ben in: Ada asks, he accepts. */
  private void invite() {
    var invited =
        actingAs(ada, participants)
            .inviteParticipant(
                InviteParticipantRequest.newBuilder()
                    .setConversationId(slug)
                    .setUserId(ben)
                    .setRequestId(freshId())
                    .build());
    System.out.printf("invited: %s%n", invited.getParticipant().getStatus());

    var accepted =
        actingAs(ben, participants)
            .acceptInvitation(
                AcceptInvitationRequest.newBuilder()
                    .setConversationId(slug)
                    .setRequestId(freshId())
                    .build());
    System.out.printf("accepted: %s%n", accepted.getParticipant().getStatus());
  }

  /** Sends a message twice under one request_id, as if the answer had been lost: it is one. */
  private void talk() {
    var requestId = freshId();
    var first = send(ada, "Lunch?", requestId);
    var again = send(ada, "Lunch?", requestId);
    System.out.printf("sent: %d %s%n", first.getSequence(), first.getContent());
    System.out.printf("sent again: %d %s%n", again.getSequence(), again.getContent());

    send(ben, "At one.", freshId());
    send(ada, "Where?", freshId());
    send(ben, "The usual place.", freshId());
    send(ada, "See you.", freshId());
  }

  private Message send(String sender, String content, String requestId) {
    return actingAs(sender, messages)
        .sendMessage(
            SendMessageRequest.newBuilder()
                .setConversationId(slug)
                .setRole(Message.Role.ROLE_USER)
                .setContent(content)
                .setRequestId(requestId)
                .build())
        .getMessage();
  }

  /** Asks for a slug that is taken: the status tells the kind of error, the reason which. */
  private void collide() throws InvalidProtocolBufferException {
    try {
      create(slug);
    } catch (StatusRuntimeException error) {
      if (!reason(error).equals("SLUG_TAKEN")) {
        throw error;
      }
      create(slug + "-2");
      System.out.printf("refused: SLUG_TAKEN, so %s-2%n", slug);
    }
  }

  /** Reads from the newest message to the first; the last page has no next_page_token. */
  private void pageBack() {
    var request = ListMessagesRequest.newBuilder().setConversationId(slug).setPageSize(2);
    do {
      var page = actingAs(ada, messages).listMessages(request.build());
      var lines =
          page.getMessagesList().stream()
              .map(message -> message.getSequence() + " " + message.getContent())
              .collect(Collectors.joining(" | "));
      System.out.printf("page: %s%n", lines);
      request.setPageToken(page.getNextPageToken());
    } while (!request.getPageToken().isEmpty());
  }

  /** Watches from the first event on, is cut off, and goes on from the cursor. */
  private void follow() throws Exception {
    var request = WatchRequest.newBuilder().setConversationId(slug).setOldest(true);
    String cursor;
    // To close a context ends the calls made in it.
    try (var watching = Context.current().withCancellation()) {
      var stream = watching.call(() -> actingAs(ada, events).watch(request.build()));
      var live = send(ben, "On my way.", freshId());
      cursor = readUntil(stream, live);
    }
    System.out.println("cut");

    var missed = send(ben, "Here I am.", freshId());
    request.setResumeCursor(cursor);
    try (var watching = Context.current().withCancellation()) {
      readUntil(watching.call(() -> actingAs(ada, events).watch(request.build())), missed);
    }
  }

  /**
   * Prints events until the message has come. The cursor stands behind all events of its response:
   * keep it only when they are dealt with.
   */
  private static String readUntil(Iterator<WatchResponse> stream, Message message) {
    while (stream.hasNext()) {
      var response = stream.next();
      for (var event : response.getEventsList()) {
        System.out.printf("event: %d %s%n", event.getVersion(), event.getType());
      }
      if (response.getEventsList().stream()
          .anyMatch(event -> event.getSequence() == message.getSequence())) {
        return response.getCursor();
      }
    }
    throw new IllegalStateException("The watch ended.");
  }

  private static String freshId() {
    return UUID.randomUUID().toString();
  }
}
