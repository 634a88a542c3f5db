package main

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"net"
	"runtime"
	"strconv"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
)

const (
	// What a server may send before it is told that it was read.
	streamWindow, connectionWindow = 16 << 20, 1 << 30
	prefixBytes                    = 5
)

// A client calls one server over one connection, and over a new one when that is given up.
//
// It speaks HTTP/2 by frames and no more of gRPC than a load needs: a general client took as much of
// PostgreSQL's core as half of what PostgreSQL did there, and measured itself.
type client struct {
	address string
	mutex   sync.Mutex
	current *connection
}

// open begins a call with one message; what comes is told to the stream.
func (c *client) open(path, token, actor, timeout string, message []byte, s *stream) error {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	if c.current == nil || !c.current.begin(path, token, actor, timeout, message, s) {
		fresh, err := dial(c.address)
		if err != nil {
			return err
		}
		c.current = fresh
		if !fresh.begin(path, token, actor, timeout, message, s) {
			return errors.New("a new connection takes no calls")
		}
	}
	return nil
}

// A stream is one call's: where its messages go, and how it ended.
type stream struct {
	// Nil where nobody reads what is answered.
	message func([]byte)
	ended   chan codes.Code

	partial []byte
	code    codes.Code
	unread  uint32
}

type connection struct {
	authority string
	framer    *http2.Framer

	// What follows is held by the mutex.
	mutex   sync.Mutex
	out     *bufio.Writer
	header  *hpack.Encoder
	block   bytes.Buffer
	streams map[uint32]*stream
	next    uint32
	// How much the server still takes; `roomy` says that it is more.
	window  int64
	roomy   *sync.Cond
	leaving bool

	flush  chan struct{}
	unread uint32
}

func dial(address string) (*connection, error) {
	socket, err := net.Dial("tcp", address)
	if err != nil {
		return nil, err
	}
	c := &connection{
		authority: address,
		out:       bufio.NewWriterSize(socket, 64<<10),
		streams:   map[uint32]*stream{},
		next:      1,
		window:    65_535,
		flush:     make(chan struct{}, 1),
	}
	c.roomy = sync.NewCond(&c.mutex)
	c.header = hpack.NewEncoder(&c.block)
	c.framer = http2.NewFramer(c.out, bufio.NewReaderSize(socket, 64<<10))
	c.framer.SetReuseFrames()
	c.framer.ReadMetaHeaders = hpack.NewDecoder(4096, nil)
	c.out.WriteString(http2.ClientPreface)
	c.framer.WriteSettings(
		http2.Setting{ID: http2.SettingEnablePush, Val: 0},
		http2.Setting{ID: http2.SettingInitialWindowSize, Val: streamWindow},
	)
	c.framer.WriteWindowUpdate(0, connectionWindow)
	go c.write()
	go c.read()
	c.soon()
	return c, nil
}

// begin writes a call's headers and its only message; false if the connection takes no more calls.
func (c *connection) begin(
	path, token, actor, timeout string, message []byte, s *stream,
) bool {
	size := int64(prefixBytes + len(message))
	c.mutex.Lock()
	defer c.mutex.Unlock()
	for c.window < size && !c.leaving {
		c.soon()
		c.roomy.Wait()
	}
	if c.leaving {
		return false
	}
	c.window -= size
	id := c.next
	c.next += 2
	c.streams[id] = s

	c.block.Reset()
	c.field(":method", "POST", false)
	c.field(":scheme", "http", false)
	c.field(":path", path, false)
	c.field(":authority", c.authority, false)
	c.field("content-type", "application/grpc", false)
	c.field("te", "trailers", false)
	c.field("authorization", "Bearer "+token, false)
	if timeout != "" {
		c.field("grpc-timeout", timeout, false)
	}
	// There are many of them: each would drive another out of the table.
	c.field("x-parley-actor", actor, true)
	c.framer.WriteHeaders(http2.HeadersFrameParam{
		StreamID: id, BlockFragment: c.block.Bytes(), EndHeaders: true,
	})
	data := make([]byte, prefixBytes, size)
	binary.BigEndian.PutUint32(data[1:], uint32(len(message)))
	c.framer.WriteData(id, true, append(data, message...))
	c.soon()
	return true
}

func (c *connection) field(name, value string, once bool) {
	c.header.WriteField(hpack.HeaderField{Name: name, Value: value, Sensitive: once})
}

// soon has what was written sent, once those who are about to write have done so.
func (c *connection) soon() {
	select {
	case c.flush <- struct{}{}:
	default:
	}
}

func (c *connection) write() {
	for range c.flush {
		runtime.Gosched()
		c.mutex.Lock()
		err := c.out.Flush()
		c.mutex.Unlock()
		if err != nil {
			return
		}
	}
}

func (c *connection) read() {
	for {
		frame, err := c.framer.ReadFrame()
		if err != nil {
			c.abandon()
			return
		}
		switch frame := frame.(type) {
		case *http2.DataFrame:
			c.data(frame)
		case *http2.MetaHeadersFrame:
			c.headers(frame)
		case *http2.RSTStreamFrame:
			c.end(frame.StreamID, codes.Unavailable)
		case *http2.WindowUpdateFrame:
			// A stream's own window holds more than any request of ours.
			if frame.StreamID == 0 {
				c.locked(func() { c.window += int64(frame.Increment); c.roomy.Broadcast() })
			}
		case *http2.SettingsFrame:
			if !frame.IsAck() {
				c.locked(func() { c.framer.WriteSettingsAck() })
			}
		case *http2.PingFrame:
			if !frame.IsAck() {
				c.locked(func() { c.framer.WritePing(true, frame.Data) })
			}
		case *http2.GoAwayFrame:
			// What has begun is answered; what is new goes elsewhere.
			c.locked(func() { c.leaving = true; c.roomy.Broadcast() })
		}
	}
}

func (c *connection) locked(do func()) {
	c.mutex.Lock()
	do()
	c.mutex.Unlock()
	c.soon()
}

func (c *connection) find(id uint32) *stream {
	c.mutex.Lock()
	defer c.mutex.Unlock()
	return c.streams[id]
}

func (c *connection) data(frame *http2.DataFrame) {
	s := c.find(frame.StreamID)
	c.unread += frame.Length
	if c.unread > connectionWindow/2 {
		c.locked(func() { c.framer.WriteWindowUpdate(0, c.unread) })
		c.unread = 0
	}
	if s == nil || s.message == nil {
		return
	}
	s.unread += frame.Length
	if s.unread > streamWindow/2 {
		c.locked(func() { c.framer.WriteWindowUpdate(frame.StreamID, s.unread) })
		s.unread = 0
	}
	s.partial = append(s.partial, frame.Data()...)
	for len(s.partial) >= prefixBytes {
		size := prefixBytes + int(binary.BigEndian.Uint32(s.partial[1:]))
		if len(s.partial) < size {
			return
		}
		s.message(s.partial[prefixBytes:size])
		s.partial = append(s.partial[:0], s.partial[size:]...)
	}
}

func (c *connection) headers(frame *http2.MetaHeadersFrame) {
	if !frame.StreamEnded() {
		return
	}
	code := codes.Unknown
	for _, field := range frame.RegularFields() {
		if field.Name == "grpc-status" {
			number, _ := strconv.Atoi(field.Value)
			code = codes.Code(number)
		}
	}
	c.end(frame.StreamID, code)
}

func (c *connection) end(id uint32, code codes.Code) {
	c.mutex.Lock()
	s := c.streams[id]
	delete(c.streams, id)
	c.mutex.Unlock()
	if s != nil {
		s.ended <- code
	}
}

// abandon ends what is still under way when the server has closed the connection.
func (c *connection) abandon() {
	c.mutex.Lock()
	c.leaving = true
	ids := make([]uint32, 0, len(c.streams))
	for id := range c.streams {
		ids = append(ids, id)
	}
	c.roomy.Broadcast()
	c.mutex.Unlock()
	for _, id := range ids {
		c.end(id, codes.Unavailable)
	}
}
