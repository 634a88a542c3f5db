package main

import (
	"errors"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/encoding/protowire"
)

const watchPath = "/parley.v1.EventService/Watch"

// An audience watches conversations and counts what it is told.
type audience struct {
	watchers  []*watcher
	delivered atomic.Int64
	// How many events are awaited; a word in `reached` says that they have come.
	target  atomic.Int64
	reached chan struct{}
}

// A watcher has one stream.
type watcher struct {
	stream stream
	mutex  sync.Mutex
	// Whether anything has come: the first response says that the stream follows.
	follows bool
	// How long after its commit each event was here.
	took []time.Duration
}

// gather opens the streams and returns when all of them follow what happens.
func gather(job *job, clients []*client) (*audience, error) {
	audience := &audience{
		watchers: make([]*watcher, job.Watchers),
		reached:  make(chan struct{}, 1),
	}
	following := make(chan struct{}, job.Watchers)
	for i := range audience.watchers {
		to := job.Conversations[i%len(job.Conversations)]
		actor := to.Actors[i/len(job.Conversations)%len(to.Actors)]
		w := &watcher{stream: stream{ended: make(chan codes.Code, 1)}}
		audience.watchers[i] = w
		w.stream.message = func(response []byte) {
			if !w.follows {
				w.follows = true
				following <- struct{}{}
				return
			}
			audience.note(w, response, time.Now())
		}
		request := appendString(nil, 1, to.ID)
		err := clients[i%len(clients)].open(watchPath, job.Token, actor, "", request, &w.stream)
		if err != nil {
			return nil, err
		}
	}
	late := time.After(patience)
	for range audience.watchers {
		select {
		case <-following:
		case <-late:
			return nil, errors.New("not all who watch were let in")
		}
	}
	return audience, nil
}

func (a *audience) note(w *watcher, response []byte, at time.Time) {
	count := int64(0)
	w.mutex.Lock()
	for event := range fields(response, 1) {
		for committed := range fields(event, 5) {
			w.took = append(w.took, at.Sub(timeOf(committed)))
		}
		count++
	}
	w.mutex.Unlock()
	if count > 0 && a.delivered.Add(count) >= a.target.Load() {
		select {
		case a.reached <- struct{}{}:
		default:
		}
	}
}

// await returns when so many events have been delivered; false if they do not come.
func (a *audience) await(count int64) bool {
	a.target.Store(count)
	late := time.After(patience)
	for a.delivered.Load() < count {
		select {
		case <-a.reached:
		case <-late:
			return false
		}
	}
	return true
}

// watched has messages sent while the audience watches, and sums up what that was told.
func watched(job *job, clients []*client, audience *audience) (*result, error) {
	each := int64(job.Watchers / len(job.Conversations))
	workers := make([]worker, job.InFlight)
	started := time.Now()
	end := started.Add(time.Duration(job.Seconds * float64(time.Second)))
	var group sync.WaitGroup
	for i := range workers {
		client := clients[i%len(clients)]
		group.Go(func() {
			switch {
			case job.InStep:
				workers[i].callInStep(end, job, client, audience, each)
			case job.Rate > 0:
				workers[i].callAtRate(end, job, client)
			default:
				workers[i].callUntil(end, job, client)
			}
		})
	}
	group.Wait()
	sent := summary(workers, time.Since(started).Seconds())
	if !audience.await(int64(sent.OK) * each) {
		return nil, errors.New("what was sent was not told to all who watch")
	}
	seconds := time.Since(started).Seconds()

	told := make([]worker, len(audience.watchers))
	for i, watcher := range audience.watchers {
		watcher.mutex.Lock()
		told[i] = worker{took: watcher.took, errors: map[string]int{}}
		watcher.mutex.Unlock()
		select {
		case code := <-watcher.stream.ended:
			told[i].errors[code.String()]++
		default:
		}
	}
	result := summary(told, seconds)
	result.Sent = sent.OK
	for code, count := range sent.Errors {
		result.Errors[code] += count
	}
	return result, nil
}

// One message is with all who watch before the next is sent.
func (w *worker) callInStep(
	end time.Time, job *job, client *client, audience *audience, each int64,
) {
	w.errors = map[string]int{}
	for time.Now().Before(end) {
		w.call(job, client)
		if !audience.await(int64(len(w.took)) * each) {
			return
		}
	}
}

// All workers together make so many calls a second, each at its own times.
func (w *worker) callAtRate(end time.Time, job *job, client *client) {
	w.errors = map[string]int{}
	interval := time.Duration(float64(job.InFlight) / job.Rate * float64(time.Second))
	due := time.Now().Add(time.Duration(rand.Int64N(int64(interval))))
	for ; due.Before(end); due = due.Add(interval) {
		time.Sleep(time.Until(due))
		w.call(job, client)
	}
}

// fields are the length-delimited fields of a message with this number.
func fields(message []byte, number protowire.Number) func(yield func([]byte) bool) {
	return func(yield func([]byte) bool) {
		for len(message) > 0 {
			found, kind, n := protowire.ConsumeTag(message)
			if n < 0 {
				return
			}
			message = message[n:]
			n = protowire.ConsumeFieldValue(found, kind, message)
			if n < 0 {
				return
			}
			if found == number && kind == protowire.BytesType {
				value, _ := protowire.ConsumeBytes(message)
				if !yield(value) {
					return
				}
			}
			message = message[n:]
		}
	}
}

// timeOf reads a google.protobuf.Timestamp.
func timeOf(message []byte) time.Time {
	var parts [3]int64
	for len(message) > 0 {
		number, kind, n := protowire.ConsumeTag(message)
		if n < 0 || kind != protowire.VarintType || number > 2 {
			break
		}
		value, m := protowire.ConsumeVarint(message[n:])
		if m < 0 {
			break
		}
		parts[number] = int64(value)
		message = message[n+m:]
	}
	return time.Unix(parts[1], parts[2])
}
