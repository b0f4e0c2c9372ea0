package probes

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/host/hosttest"
)

// realSockets is a host from a case whose daemons are servers of the test.
type realSockets struct {
	*hosttest.Host
	live *host.Host
	// udp is where the test's server listens instead of where it is dialled.
	udp string
}

func (r realSockets) Dial(ctx context.Context, network, address string) (net.Conn, error) {
	if network == "udp" {
		address = r.udp
	}
	return r.live.Dial(ctx, network, address)
}

// badTime is what the context of a pass has left for a daemon that behaves badly;
// the probes' own patience is longer.
const badTime = 400 * time.Millisecond

func withRealSockets(t *testing.T, text string) (v realSockets, dir string) {
	t.Helper()
	// A socket's name has room for 108 bytes.
	dir, err := os.MkdirTemp("", "s")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	live, err := host.Open(host.Options{Root: dir})
	if err != nil {
		t.Skip(err)
	}
	t.Cleanup(func() { live.Close() })
	return realSockets{Host: hosttest.Parse(lenient{t}, text), live: live}, dir
}

// stream is how a daemon on a stream socket answers one client.
var streams = map[string]func(c net.Conn, rng *rand.Rand){
	"silence":             func(c net.Conn, _ *rand.Rand) { io.Copy(io.Discard, c) },
	"the end":             func(net.Conn, *rand.Rand) {},
	"the end after asked": func(c net.Conn, _ *rand.Rand) { c.Read(make([]byte, 64)) },
	"garbage for ever": func(c net.Conn, rng *rand.Rand) {
		buf := make([]byte, 4096)
		for {
			for i := range buf {
				buf[i] = byte(rng.Uint32())
			}
			if _, err := c.Write(buf); err != nil {
				return
			}
		}
	},
	"zeros for ever": func(c net.Conn, _ *rand.Rand) { forEver(c, make([]byte, 4096)) },
	"a length of 2^63": func(c net.Conn, _ *rand.Rand) {
		c.Write(binary.NativeEndian.AppendUint64(nil, 1<<63))
		forEver(c, []byte("x"))
	},
	"a length of -1": func(c net.Conn, _ *rand.Rand) {
		c.Write(binary.NativeEndian.AppendUint64(nil, 1<<64-1))
		forEver(c, []byte("x"))
	},
	"a length of 1": func(c net.Conn, _ *rand.Rand) { forEver(c, []byte{1, 0, 0, 0, 0, 0, 0, 0, 0}) },
	"a byte now and then": func(c net.Conn, _ *rand.Rand) {
		c.Write(binary.NativeEndian.AppendUint64(nil, 32<<20))
		for {
			if _, err := c.Write([]byte("{")); err != nil {
				return
			}
			time.Sleep(10 * time.Millisecond)
		}
	},
	"one string of 32 MB": func(c net.Conn, _ *rand.Rand) {
		daemonThenMaps(c, `{"maps":[{"name":"`, strings.Repeat("x", 1<<16))
	},
	"empty maps, 32 MB of them": func(c net.Conn, _ *rand.Rand) {
		daemonThenMaps(c, `{"maps":[{}`, strings.Repeat(",{}", 1<<14))
	},
	"a map with paths for ever": func(c net.Conn, _ *rand.Rand) {
		daemonThenMaps(c, `{"maps":[{"path_groups":[{"paths":[{}`, strings.Repeat(",{}", 1<<14))
	},
	"lists in lists": func(c net.Conn, _ *rand.Rand) {
		daemonThenMaps(c, `{"x":`, strings.Repeat("[", 1<<16))
	},
}

func forEver(w io.Writer, data []byte) {
	for {
		if _, err := w.Write(data); err != nil {
			return
		}
	}
}

// daemonThenMaps answers "show daemon" well and what comes next with a reply of
// the greatest length: a beginning, and the same again and again.
func daemonThenMaps(c net.Conn, head, again string) {
	c.Read(make([]byte, 512))
	reply := "pid 349 idle\n\x00"
	c.Write(append(binary.NativeEndian.AppendUint64(nil, uint64(len(reply))), reply...))
	c.Read(make([]byte, 512))
	c.Write(binary.NativeEndian.AppendUint64(nil, multipathdReplyMax))
	if _, err := io.WriteString(c, head); err != nil {
		return
	}
	forEver(c, []byte(again))
}

// daemonMemory bounds what talking to one daemon may take, in bytes allocated.
const daemonMemory = 96 << 20

// TestBadMultipathd: whatever stands at multipathd's socket, the pass ends with
// its context, holds no more than a part of an answer, and says of the kernel's
// maps what it says without the daemon.
func TestBadMultipathd(t *testing.T) {
	text, err := os.ReadFile("testdata/multipath/two-paths.txtar")
	if err != nil {
		t.Fatal(err)
	}
	for name, serve := range streams {
		t.Run(name, func(t *testing.T) {
			v, dir := withRealSockets(t, string(text)+"-- tree/run/multipathd.socket --\n")
			if err := os.MkdirAll(filepath.Join(dir, "run"), 0o755); err != nil {
				t.Fatal(err)
			}
			l, err := net.Listen("unix", filepath.Join(dir, "run/multipathd.socket"))
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			go func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					go func() {
						defer c.Close()
						serve(c, rand.New(rand.NewPCG(1, 1)))
					}()
				}
			}()
			out := badPass(t, DefaultMultipath(), v)
			if !strings.Contains(out, "hosthygiene_multipath_paths") {
				t.Errorf("nothing of the kernel's map:\n%s", out)
			}
		})
	}
}

// badPass makes a pass whose daemon behaves badly.
func badPass(t *testing.T, p Probe, v realSockets) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), badTime)
	defer cancel()
	in := Input{Host: v, Memory: NewMemory(), Now: v.Times()[0]}
	in.Memory.Begin()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	r, err := p.Check(ctx, in)
	runtime.ReadMemStats(&after)
	if took := after.TotalAlloc - before.TotalAlloc; took > daemonMemory {
		t.Errorf("the pass took %d MiB", took>>20)
	}
	if finding.StatusOf(r, err) == finding.OK {
		t.Errorf("all is well, it says: %s", render(r, err))
	}
	for _, f := range r.Findings {
		if len(f.Message) > 4096 {
			t.Errorf("a message of %d bytes", len(f.Message))
		}
	}
	return render(r, err)
}

// datagrams are how a daemon answers a request.
var datagrams = map[string]func(reply func([]byte), request []byte, stop <-chan struct{}){
	"silence": func(func([]byte), []byte, <-chan struct{}) {},
	"empty":   func(reply func([]byte), _ []byte, _ <-chan struct{}) { reply(nil) },
	"garbage": func(reply func([]byte), _ []byte, _ <-chan struct{}) {
		for i := range 64 {
			reply(bytes.Repeat([]byte{byte(i * 37)}, i*20))
		}
	},
	"the request": func(reply func([]byte), request []byte, _ <-chan struct{}) { reply(request) },
	"64 KB":       func(reply func([]byte), _ []byte, _ <-chan struct{}) { reply(make([]byte, 65000)) },
	"others' replies": func(reply func([]byte), request []byte, stop <-chan struct{}) {
		flood(reply, chronyAnswer(request, false), stop)
	},
	"the reply too soon": func(reply func([]byte), request []byte, _ <-chan struct{}) { reply(chronyAnswer(request, true)[:40]) },
	// Four billion sources, each as good as the next, and a clock from another age.
	"too much": func(reply func([]byte), request []byte, _ <-chan struct{}) { reply(chronyAnswer(request, true)) },
}

func flood(reply func([]byte), data []byte, stop <-chan struct{}) {
	for {
		select {
		case <-stop:
			return
		default:
			reply(data)
		}
	}
}

// chronyAnswer is a reply of the right kind to a request, all its numbers as
// large as they can be, with the right sequence or another.
func chronyAnswer(request []byte, mine bool) []byte {
	reply := bytes.Repeat([]byte{0xff}, 104)
	copy(reply, []byte{6, 2, 0, 0})
	copy(reply[4:6], request[4:6])
	code := map[uint16]uint16{chronyTracking: 5, chronyNSources: 2, chronySourceData: 3}[binary.BigEndian.Uint16(request[4:6])]
	binary.BigEndian.PutUint16(reply[6:], code)
	clear(reply[8:16])
	copy(reply[16:20], request[8:12])
	if !mine {
		reply[16]++
	}
	return reply
}

// TestBadChronyd: the same of chronyd, on its port and on its socket.
func TestBadChronyd(t *testing.T) {
	const text = `-- procs --
350 chronyd
-- tree/proc/350/status --
CapEff:	0000000002000400
-- adjtimex --
state=5 status=0x40 offset=0s maxerror=16s esterror=16s
-- units --
*
`
	for _, network := range []string{"udp", "unixgram"} {
		for name, answer := range datagrams {
			t.Run(network+" "+name, func(t *testing.T) {
				v, dir := withRealSockets(t, text)
				var l net.PacketConn
				var err error
				if network == "udp" {
					l, err = net.ListenPacket("udp", "127.0.0.1:0")
				} else {
					if err := os.MkdirAll(filepath.Join(dir, "run/chrony"), 0o755); err != nil {
						t.Fatal(err)
					}
					l, err = net.ListenPacket("unixgram", filepath.Join(dir, chronySock))
				}
				if err != nil {
					t.Fatal(err)
				}
				if v.udp = "127.0.0.1:1"; network == "udp" {
					v.udp = l.LocalAddr().String()
				}
				stop, done := make(chan struct{}), make(chan struct{})
				go func() {
					defer close(done)
					buf := make([]byte, 512)
					for {
						n, from, err := l.ReadFrom(buf)
						if err != nil {
							return
						}
						if n >= 12 {
							answer(func(data []byte) { l.WriteTo(data, from) }, slices.Clone(buf[:n]), stop)
						}
					}
				}()
				badPass(t, DefaultTime(), v)
				close(stop)
				l.Close()
				<-done
				if network == "unixgram" {
					if left, err := os.ReadDir(filepath.Join(dir, "run/chrony")); err != nil || len(left) > 1 {
						t.Errorf("left behind: %v, %v", left, err)
					}
				}
			})
		}
	}
}

// TestBadKubelet: pods decide what the kubelet's answer holds.
func TestBadKubelet(t *testing.T) {
	endless := func(head, again string) io.Reader {
		return io.MultiReader(strings.NewReader(head), &repeat{text: []byte(again), n: 64 << 20})
	}
	for name, answer := range map[string]io.Reader{
		"one string":             endless(`{"items":[{"metadata":{"name":"`, "x"),
		"pods of nothing":        endless(`{"items":[{}`, ",{}"),
		"containers of nothing":  endless(`{"items":[{"spec":{"containers":[{}`, ",{}"),
		"lists":                  endless(`{"x":`, "["),
		"blanks":                 endless(`{`, " "),
		"a key":                  endless(`{"`, "k"),
		"annotations, many pods": endless(`{"items":[`, fmt.Sprintf(`{"metadata":{"annotations":{"x":%q}}},`, strings.Repeat("y", 1<<20))),
	} {
		var before, after runtime.MemStats
		var most uint64
		runtime.ReadMemStats(&before)
		pods, err := parseKubeletPods(&watchedReader{Reader: answer, most: &most})
		runtime.ReadMemStats(&after)
		if err == nil {
			t.Errorf("%s: %d pods and no error", name, len(pods))
		}
		// What is held at a time; what is let go again does not count.
		if most > before.HeapAlloc+daemonMemory {
			t.Errorf("%s: %d MiB were held", name, (most-before.HeapAlloc)>>20)
		}
	}
}

type repeat struct {
	text []byte
	n    int
	at   int
}

func (r *repeat) Read(p []byte) (int, error) {
	if r.n <= 0 {
		return 0, io.EOF
	}
	for i := range p {
		p[i] = r.text[r.at]
		r.at = (r.at + 1) % len(r.text)
	}
	r.n -= len(p)
	return len(p), nil
}

// watchedReader notes now and then how large the heap is.
type watchedReader struct {
	io.Reader
	most  *uint64
	reads int
}

func (w *watchedReader) Read(p []byte) (int, error) {
	n, err := w.Reader.Read(p)
	if w.reads++; n > 1<<18 || w.reads%1024 == 0 {
		var now runtime.MemStats
		runtime.ReadMemStats(&now)
		*w.most = max(*w.most, now.HeapAlloc)
	}
	return n, err
}
