// Command load calls one method of a Parley server for a while and says how that went.
//
// It reads one job, says "ready" when it begins, and writes one result, both JSON, so that Python,
// which would eat the processor that it measures, only orchestrates. The few requests are written
// field by field: no generated code, and no protobuf message is made on the way out or in.
package main

import (
	"encoding/json"
	"fmt"
	"log"
	"math/rand/v2"
	"os"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

// As a call tells the server, and how long anything is awaited here.
const callTimeout, patience = "10S", 12 * time.Second

type job struct {
	Address       string         `json:"address"`
	Token         string         `json:"token"`
	Method        string         `json:"method"`
	Seconds       float64        `json:"seconds"`
	InFlight      int            `json:"in_flight"`
	Connections   int            `json:"connections"`
	Conversations []conversation `json:"conversations"`
	Bodies        []string       `json:"bodies"`
	PageSize      uint64         `json:"page_size"`
	PageToken     string         `json:"page_token"`
	// So many watch the conversations meanwhile, as many each; then what they are told is counted.
	Watchers int `json:"watchers"`
	// One message is with all of them before the next is sent.
	InStep bool `json:"in_step"`
	// Calls a second; 0 is as many as can be.
	Rate float64 `json:"rate"`
}

// A conversation to call for, those who take part in it, and its last message's number.
type conversation struct {
	ID           string   `json:"id"`
	Actors       []string `json:"actors"`
	LastSequence int64    `json:"last_sequence"`
}

// Of calls, and how many of them were sends; with watchers, of the events that they were told of, and
// of how long after the commit.
type result struct {
	OK      int                `json:"ok"`
	Sent    int                `json:"sent"`
	Errors  map[string]int     `json:"errors"`
	Seconds float64            `json:"seconds"`
	Rate    float64            `json:"rate"`
	Millis  map[string]float64 `json:"millis"`
}

type method struct {
	path   string
	encode func(job *job, to conversation) []byte
}

var methods = map[string]method{
	"SendMessage":     {"/parley.v1.MessageService/SendMessage", sendMessage},
	"GetMessage":      {"/parley.v1.MessageService/GetMessage", getMessage},
	"ListMessages":    {"/parley.v1.MessageService/ListMessages", listMessages},
	"ListFiltered":    {"/parley.v1.MessageService/ListMessages", listFiltered},
	"ListAround":      {"/parley.v1.MessageService/ListMessages", listAround},
	"GetConversation": {"/parley.v1.ConversationService/GetConversation", getConversation},
	"ListUserConversations": {
		"/parley.v1.ConversationService/ListUserConversations", listUserConversations},
	"SearchMessages": {"/parley.v1.MessageService/SearchMessages", searchMessages},
}

// Mixed is a day's work, of ten calls: each message is listed by more people than sent it.
var mixed = []string{
	"SendMessage", "SendMessage", "SendMessage",
	"ListMessages", "ListMessages", "ListMessages", "ListMessages",
	"GetMessage", "GetMessage", "GetConversation",
}

func main() {
	var job job
	if err := json.NewDecoder(os.Stdin).Decode(&job); err != nil {
		log.Fatal(err)
	}
	// The server ends a call that takes too long; this is for one that says nothing at all.
	length := time.Duration(job.Seconds * float64(time.Second))
	time.AfterFunc(length+2*patience, func() { log.Fatal("calls are not answered") })
	result, err := run(&job)
	if err != nil {
		log.Fatal(err)
	}
	if err := json.NewEncoder(os.Stdout).Encode(result); err != nil {
		log.Fatal(err)
	}
}

func run(job *job) (*result, error) {
	clients := make([]*client, job.Connections)
	for i := range clients {
		clients[i] = &client{address: job.Address}
	}

	if job.Watchers > 0 {
		audience, err := gather(job, clients)
		if err != nil {
			return nil, err
		}
		fmt.Println("ready")
		return watched(job, clients, audience)
	}

	fmt.Println("ready")
	workers := make([]worker, job.InFlight)
	started := time.Now()
	end := started.Add(time.Duration(job.Seconds * float64(time.Second)))
	var group sync.WaitGroup
	for i := range workers {
		group.Go(func() { workers[i].callUntil(end, job, clients[i%len(clients)]) })
	}
	group.Wait()
	return summary(workers, time.Since(started).Seconds()), nil
}

// A worker has one call in flight.
type worker struct {
	took   []time.Duration
	sent   int
	errors map[string]int
}

func (w *worker) callUntil(end time.Time, job *job, client *client) {
	w.errors = map[string]int{}
	for time.Now().Before(end) {
		w.call(job, client)
	}
}

func (w *worker) call(job *job, client *client) {
	started := time.Now()
	name := job.Method
	if name == "Mixed" {
		name = mixed[rand.IntN(len(mixed))]
	}
	method := methods[name]
	to := job.Conversations[rand.IntN(len(job.Conversations))]
	actor := to.Actors[rand.IntN(len(to.Actors))]
	stream := &stream{ended: make(chan codes.Code, 1)}
	request := method.encode(job, to)
	if err := client.open(method.path, job.Token, actor, callTimeout, request, stream); err != nil {
		w.errors[codes.Unavailable.String()]++
		return
	}
	if code := <-stream.ended; code != codes.OK {
		w.errors[code.String()]++
		return
	}
	w.took = append(w.took, time.Since(started))
	if name == "SendMessage" {
		w.sent++
	}
}

func summary(workers []worker, seconds float64) *result {
	var took []time.Duration
	result := &result{Errors: map[string]int{}, Seconds: seconds, Millis: map[string]float64{}}
	for _, worker := range workers {
		took = append(took, worker.took...)
		result.Sent += worker.sent
		for code, count := range worker.errors {
			result.Errors[code] += count
		}
	}
	result.OK = len(took)
	result.Rate = float64(len(took)) / seconds
	slices.Sort(took)
	for name, share := range map[string]float64{"p50": .5, "p90": .9, "p99": .99, "p99.9": .999} {
		if len(took) > 0 {
			result.Millis[name] = took[int(share*float64(len(took)))].Seconds() * 1000
		}
	}
	return result
}

// The requests, by the field numbers of protos/parley/v1.

func sendMessage(job *job, to conversation) []byte {
	request := appendString(nil, 1, to.ID)
	request = appendNumber(request, 3, 1) // ROLE_USER
	request = appendString(request, 4, job.Bodies[rand.IntN(len(job.Bodies))])
	return appendString(request, 17, fmt.Sprintf("%016x%016x", rand.Uint64(), rand.Uint64()))
}

func getMessage(_ *job, to conversation) []byte {
	return appendNumber(appendString(nil, 1, to.ID), 3, 1+rand.Uint64N(uint64(to.LastSequence)))
}

func listMessages(job *job, to conversation) []byte {
	request := appendNumber(appendString(nil, 1, to.ID), 2, job.PageSize)
	return appendString(request, 3, job.PageToken)
}

// Those made since 1970: nothing that a filter lets pass is known before it is read.
func listFiltered(job *job, to conversation) []byte {
	return append(listMessages(job, to), 9<<3|2, 2, 1<<3, 1)
}

// A window around a message anywhere in the conversation.
func listAround(job *job, to conversation) []byte {
	request := appendNumber(appendString(nil, 1, to.ID), 2, job.PageSize)
	return appendNumber(request, 12, 1+rand.Uint64N(uint64(to.LastSequence)))
}

func getConversation(_ *job, to conversation) []byte {
	return appendString(nil, 1, to.ID)
}

// The actor's own inbox: whose it is need not be said.
func listUserConversations(job *job, _ conversation) []byte {
	return appendNumber(nil, 2, job.PageSize)
}

// A conversation without an id stands for all of the actor's.
func searchMessages(job *job, to conversation) []byte {
	request := appendString(nil, 1, job.Bodies[rand.IntN(len(job.Bodies))])
	return appendNumber(appendString(request, 2, to.ID), 7, job.PageSize)
}

func appendString(to []byte, field protowire.Number, value string) []byte {
	return protowire.AppendString(protowire.AppendTag(to, field, protowire.BytesType), value)
}

func appendNumber(to []byte, field protowire.Number, value uint64) []byte {
	return protowire.AppendVarint(protowire.AppendTag(to, field, protowire.VarintType), value)
}
