package hosttest

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// A dialogue is a list of requests, each followed by the replies it draws:
//
//	> hex 0601 0000 0021 0000 SSSSSSSS
//	< hex 0602 0000 0021 0005 ... SSSSSSSS ...
//	> mpath show maps json
//	< mpath
//	{"major_version":0, ...
//	> hex 00
//	< silence
//	< close
//
// "hex" is bytes; trailing zero bytes of a request do not matter; SSSSSSSS in a
// request matches any four bytes and stands for the same four in its replies.
// "mpath" adds multipathd's framing: an 8-byte length and a trailing NUL.
// Requests may come in any order and repeatedly. The whole section may instead
// be "refused", "absent", "denied" or "busy", which is the answer to connect(2).
type exchange struct {
	request []byte
	seqAt   int // offset of SSSSSSSS in the request, -1 without
	replies []reply
}

type reply struct {
	data           []byte
	seqAt          int
	silence, close bool
}

type conn struct {
	t        testing.TB
	name     string
	datagram bool
	script   []exchange

	mu      sync.Mutex
	written []byte
	inbox   [][]byte
	closed  bool
}

func newConn(t testing.TB, name string, datagram bool, text string) *conn {
	return &conn{t: t, name: name, datagram: datagram, script: parseDialogue(t, name, text)}
}

func parseDialogue(t testing.TB, name, text string) []exchange {
	t.Helper()
	var script []exchange
	var body *reply // an mpath reply that is still being collected
	finish := func() {
		if body != nil {
			body.data = mpathFrame(bytes.TrimSuffix(body.data, []byte("\n")), true)
			body = nil
		}
	}
	for line := range strings.Lines(text) {
		isRequest, isReply := strings.HasPrefix(line, "> "), strings.HasPrefix(line, "< ")
		if !isRequest && !isReply {
			if body != nil {
				body.data = append(body.data, line...)
			} else if s := strings.TrimSpace(line); s != "" && !strings.HasPrefix(s, "#") {
				t.Fatalf("%s: %q", name, line)
			}
			continue
		}
		finish()
		kind, rest, _ := strings.Cut(strings.TrimSpace(line[2:]), " ")
		if isRequest {
			e := exchange{seqAt: -1}
			switch kind {
			case "hex":
				e.request, e.seqAt = parseHex(t, name, rest)
				e.request = bytes.TrimRight(e.request, "\x00")
			case "mpath":
				e.request = bytes.TrimRight(mpathFrame([]byte(rest), false), "\x00")
			default:
				t.Fatalf("%s: %q", name, line)
			}
			script = append(script, e)
			continue
		}
		if len(script) == 0 {
			t.Fatalf("%s: a reply before any request", name)
		}
		last := &script[len(script)-1]
		r := reply{seqAt: -1}
		switch kind {
		case "hex":
			r.data, r.seqAt = parseHex(t, name, rest)
		case "mpath", "silence", "close":
			r.silence, r.close = kind == "silence", kind == "close"
		default:
			t.Fatalf("%s: %q", name, line)
		}
		last.replies = append(last.replies, r)
		if kind == "mpath" {
			body = &last.replies[len(last.replies)-1]
		}
	}
	finish()
	return script
}

func parseHex(t testing.TB, name, s string) (data []byte, seqAt int) {
	t.Helper()
	s = strings.Join(strings.Fields(s), "")
	seqAt = strings.Index(s, "SSSSSSSS")
	data, err := hex.DecodeString(strings.ReplaceAll(s, "SSSSSSSS", "00000000"))
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	if seqAt >= 0 {
		seqAt /= 2
	}
	return data, seqAt
}

func mpathFrame(body []byte, newline bool) []byte {
	if newline {
		body = append(body, '\n')
	}
	out := binary.LittleEndian.AppendUint64(nil, uint64(len(body)+1))
	return append(append(out, body...), 0)
}

func (c *conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return 0, net.ErrClosed
	}
	c.written = append(c.written, p...)
	if !c.datagram {
		// A stream request is complete with its length; only multipathd's
		// framing is known here.
		if len(c.written) < 8 || uint64(len(c.written)-8) < binary.LittleEndian.Uint64(c.written) {
			return len(p), nil
		}
	}
	c.answer(bytes.TrimRight(c.written, "\x00"))
	c.written = nil
	return len(p), nil
}

func (c *conn) answer(request []byte) {
	for _, e := range c.script {
		got := slices.Clone(request)
		var seq []byte
		if e.seqAt >= 0 {
			for len(got) < e.seqAt+4 {
				got = append(got, 0)
			}
			seq = slices.Clone(got[e.seqAt : e.seqAt+4])
			clear(got[e.seqAt : e.seqAt+4])
			got = bytes.TrimRight(got, "\x00")
		}
		if !bytes.Equal(got, e.request) {
			continue
		}
		for _, r := range e.replies {
			switch {
			case r.close:
				c.closed = true
			case !r.silence:
				data := slices.Clone(r.data)
				if r.seqAt >= 0 {
					copy(data[r.seqAt:], seq)
				}
				c.inbox = append(c.inbox, data)
			}
		}
		return
	}
	c.t.Errorf("%s: unexpected request %x (%q)", c.name, request, request)
}

// Read never waits: when nothing is queued the peer is silent, which is what a
// deadline would find out.
func (c *conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.inbox) == 0 {
		if c.closed {
			return 0, io.EOF
		}
		return 0, os.ErrDeadlineExceeded
	}
	n := copy(p, c.inbox[0])
	if rest := c.inbox[0][n:]; c.datagram || len(rest) == 0 {
		c.inbox = c.inbox[1:]
	} else {
		c.inbox[0] = rest
	}
	return n, nil
}

func (c *conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	return nil
}

func (c *conn) LocalAddr() net.Addr              { return &net.UnixAddr{Name: "hosttest", Net: "unix"} }
func (c *conn) RemoteAddr() net.Addr             { return &net.UnixAddr{Name: c.name, Net: "unix"} }
func (c *conn) SetDeadline(time.Time) error      { return nil }
func (c *conn) SetReadDeadline(time.Time) error  { return nil }
func (c *conn) SetWriteDeadline(time.Time) error { return nil }
