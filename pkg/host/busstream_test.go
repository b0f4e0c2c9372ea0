package host

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"runtime/metrics"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// TestUsersOfTheBus: whoever is on the system bus may send signals to the agent's
// connections: files in them stay away, what the library can not take does not
// reach it, what only systemd and the bus can tell is not believed, and the agent
// goes on asking and listening.
func TestUsersOfTheBus(t *testing.T) {
	b := newBusHost(t)
	systemd := b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	if _, err := b.SystemState(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	heard, listening := make(chan string, 100), make(chan struct{})
	ended := make(chan error, 1)
	ctx := within(t, time.Minute)
	go func() {
		ended <- b.FollowUnits(ctx, []string{"chrony.service", "data.mount"}, Listener{Listening: sync.OnceFunc(func() { close(listening) }), Happened: func(name string) { heard <- name }})
	}()
	select {
	case <-listening:
	case err := <-ended:
		t.Fatal(err)
	}

	user := b.serve(t, "", func(*dbus.Conn) {})
	var names []string
	if err := user.BusObject().Call(busName+".ListNames", 0).Store(&names); err != nil {
		t.Fatal(err)
	}
	null, err := os.Open("/dev/null")
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	file := dbus.UnixFD(null.Fd())
	open := func() int {
		all, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		return len(all)
	}
	before, sent := open(), 0
	for _, dest := range names {
		if !strings.HasPrefix(dest, ":") || dest == user.Names()[0] || dest == systemd.Names()[0] {
			continue
		}
		for _, body := range [][]any{
			{file}, {file, file}, {[]dbus.UnixFD{file}}, {map[string]dbus.UnixFD{"": file}}, {dbus.MakeVariant(file)},
			{unitInterface, []dbus.UnixFD{file}, []string{}},
			{unitInterface, map[string]dbus.Variant{"ActiveState": dbus.MakeVariant("failed")}, []string{}}, {false},
			{systemdName, "", ":1.99"},
			{}, {[]string{"x"}, uint32(1)}, {strings.Repeat("x", 1<<20)}, {dbus.MakeVariant(dbus.MakeVariant(dbus.MakeVariant("x")))},
		} {
			for _, of := range []string{"org.freedesktop.DBus.Properties.PropertiesChanged", systemdManager + ".Reloading", systemdManager + ".UnitFilesChanged", busName + ".NameOwnerChanged", busName + ".NameAcquired", busName + ".NameLost"} {
				dot := strings.LastIndexByte(of, '.')
				sent++
				user.Send(&dbus.Message{Type: dbus.TypeSignal, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{
					dbus.FieldPath: dbus.MakeVariant(dbus.ObjectPath(unitDir + "chrony_2eservice")), dbus.FieldDestination: dbus.MakeVariant(dest),
					dbus.FieldInterface: dbus.MakeVariant(of[:dot]), dbus.FieldMember: dbus.MakeVariant(of[dot+1:]),
					dbus.FieldSignature: dbus.MakeVariant(dbus.SignatureOf(body...)),
				}}, nil)
			}
		}
	}
	if sent < 50 {
		t.Fatalf("%d signals to %q", sent, names)
	}
	// What the user sent before this answer the agent has been sent too.
	if err := user.BusObject().Call("org.freedesktop.DBus.Peer.Ping", 0).Err; err != nil {
		t.Fatal(err)
	}
	if err := systemd.Emit(unitDir+"data_2emount", "org.freedesktop.DBus.Properties.PropertiesChanged", unitInterface,
		map[string]dbus.Variant{"ActiveState": dbus.MakeVariant("failed")}, []string{}); err != nil {
		t.Fatal(err)
	}
	select {
	case name := <-heard:
		if name != "data.mount" {
			t.Errorf("it takes from a user that something happened to %s", name)
		}
	case err := <-ended:
		t.Fatalf("it listens no more: %v", err)
	}
	if state, err := b.SystemState(within(t, 10*time.Second)); state != "degraded" || err != nil {
		t.Errorf("%q, %v", state, err)
	}
	if after := open(); after > before {
		t.Errorf("%d files are open, before it were %d", after, before)
	}
}

// busMessage is an answer to a call, or what nobody has asked for.
func busMessage(kind dbus.Type, to *dbus.Message, body ...any) []byte {
	m := dbus.Message{Type: kind, Body: body, Headers: map[dbus.HeaderField]dbus.Variant{}}
	if kind == dbus.TypeSignal || kind == dbus.TypeMethodCall {
		m.Headers[dbus.FieldPath] = dbus.MakeVariant(dbus.ObjectPath("/"))
		m.Headers[dbus.FieldInterface], m.Headers[dbus.FieldMember] = dbus.MakeVariant(busName), dbus.MakeVariant("NameLost")
		m.Headers[dbus.FieldSender] = dbus.MakeVariant(busName)
	} else {
		m.Headers[dbus.FieldReplySerial] = dbus.MakeVariant(to.Serial())
	}
	if kind == dbus.TypeError {
		m.Headers[dbus.FieldErrorName] = dbus.MakeVariant("org.example.Error")
	}
	if len(body) > 0 {
		m.Headers[dbus.FieldSignature] = dbus.MakeVariant(dbus.SignatureOf(body...))
	}
	var b bytes.Buffer
	if err := m.EncodeTo(&b, binary.LittleEndian); err != nil {
		panic(err)
	}
	return b.Bytes()
}

// busHead is the fixed part of a message whose sizes lie.
func busHead(kind byte, body, fields uint32) string {
	b := []byte{'l', kind, 0, 1}
	for _, n := range []uint32{body, 1, fields} {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return string(b)
}

// endless writes the same until the other side goes.
func endless(c io.Writer, data string) {
	again := []byte(strings.Repeat(data, 1+4096/len(data)))
	for {
		if _, err := c.Write(again); err != nil {
			return
		}
	}
}

// dribble writes the same, a byte now and then.
func dribble(c io.Writer, data string) {
	for i := 0; ; i++ {
		if _, err := c.Write([]byte{data[i%len(data)]}); err != nil {
			return
		}
		time.Sleep(2 * time.Millisecond)
	}
}

// heldAtMost looks at the heap again and again, and says by how much it has grown
// at most. What is let go at once counts only until it is collected.
func heldAtMost(t *testing.T) func() uint64 {
	runtime.GC()
	now := func() uint64 {
		s := []metrics.Sample{{Name: "/memory/classes/heap/objects:bytes"}}
		metrics.Read(s)
		return s[0].Value.Uint64()
	}
	before, most := now(), uint64(0)
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			most = max(most, now())
			select {
			case <-stop:
				return
			case <-time.After(2 * time.Millisecond):
			}
		}
	}()
	return func() uint64 {
		close(stop)
		<-stopped
		return most - min(most, before)
	}
}

// TestBadBus: whatever stands at the bus's socket, a question ends with its
// context, takes a bounded amount of memory, keeps no connection and is answered
// by an error.
func TestBadBus(t *testing.T) {
	// afterAuth goes on where messages begin; r has what the agent sends.
	afterAuth := func(serve func(c net.Conn, r *bufio.Reader)) func(net.Conn) {
		return func(c net.Conn) {
			if r, err := handshake(c); err == nil {
				serve(c, r)
			}
		}
	}
	answering := func(answer func(call *dbus.Message) []byte) func(net.Conn) {
		return afterAuth(func(c net.Conn, r *bufio.Reader) {
			for {
				call, err := dbus.DecodeMessage(r)
				if err != nil {
					return
				}
				if _, err := c.Write(answer(call)); err != nil {
					return
				}
			}
		})
	}
	// befitting lets the bus itself answer, and systemd badly.
	befitting := func(body ...any) func(net.Conn) {
		return answering(func(call *dbus.Message) []byte {
			if call.Headers[dbus.FieldMember].Value() == "Hello" {
				return busMessage(dbus.TypeMethodReply, call, ":1.1")
			}
			return busMessage(dbus.TypeMethodReply, call, body...)
		})
	}
	deep := dbus.MakeVariant("x")
	for range 60 {
		deep = dbus.MakeVariant(deep)
	}
	for name, serve := range map[string]func(net.Conn){
		"silence":             func(c net.Conn) { io.Copy(io.Discard, c) },
		"the end":             func(net.Conn) {},
		"garbage":             func(c net.Conn) { endless(c, "\x00\xff\x1b[2J") },
		"lines of garbage":    func(c net.Conn) { endless(c, "\x00\xff\r\n \r\n\n") },
		"a line for ever":     func(c net.Conn) { endless(c, "REJECTED EXTERNAL ") },
		"refusals for ever":   func(c net.Conn) { endless(c, "REJECTED EXTERNAL\r\n") },
		"questions for ever":  func(c net.Conn) { io.WriteString(c, "REJECTED EXTERNAL\r\n"); endless(c, "DATA\r\n") },
		"a line byte by byte": func(c net.Conn) { dribble(c, "REJECTED EXTERNAL ") },
		"silence after it":    afterAuth(func(c net.Conn, r *bufio.Reader) { io.Copy(io.Discard, r) }),
		"the end after it":    afterAuth(func(net.Conn, *bufio.Reader) {}),
		"garbage after it":    afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, "\x00\xff\x1b[2J") }),
		"an l for ever":       afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, "l") }),
		"byte by byte":        afterAuth(func(c net.Conn, _ *bufio.Reader) { dribble(c, busHead(2, 1<<20, 0)) }),
		"an answer of 128 MB": afterAuth(func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, busHead(2, 1<<27-16, 0)); endless(c, "x") }),
		"a size of 4 GB":      afterAuth(func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, busHead(2, 1<<32-1, 0)); endless(c, "x") }),
		"sizes that wrap":     afterAuth(func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, busHead(2, 48, 1<<32-16)); endless(c, "\x01") }),
		"a signal of 128 MB":  afterAuth(func(c net.Conn, _ *bufio.Reader) { io.WriteString(c, busHead(4, 1<<27-16, 0)); endless(c, "x") }),
		"signals for ever":    afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, string(busMessage(dbus.TypeSignal, nil))) }),
		"calls for ever":      afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, string(busMessage(dbus.TypeMethodCall, nil))) }),
		"messages of no kind": afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, busHead(9, 0, 0)) }),
		"answers to nothing": afterAuth(func(c net.Conn, _ *bufio.Reader) {
			endless(c, string(busMessage(dbus.TypeMethodReply, new(dbus.Message), "x")))
		}),
		"answers without fields": afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, busHead(2, 0, 0)) }),
		"fields that lie":        afterAuth(func(c net.Conn, _ *bufio.Reader) { endless(c, busHead(2, 0, 32)+strings.Repeat("\xff", 32)) }),
		"another type":           answering(func(call *dbus.Message) []byte { return busMessage(dbus.TypeMethodReply, call, uint32(1)) }),
		"nothing in it":          answering(func(call *dbus.Message) []byte { return busMessage(dbus.TypeMethodReply, call) }),
		"errors": answering(func(call *dbus.Message) []byte {
			return busMessage(dbus.TypeError, call, strings.Repeat("\x1b", 1<<16))
		}),
		"no units":              befitting([]string{}),
		"a number of units":     befitting(uint64(1 << 63)),
		"units of other fields": befitting([][]any{{"x", uint32(1)}}),
		"variants in variants":  befitting(deep),
		"a map":                 befitting(map[string]dbus.Variant{"x": deep}),
		"4 MB of units":         befitting(strings.Repeat("x", 4<<20)),
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			writeTree(t, dir, map[string]string{
				"proc/1/comm":              "systemd\n",
				"proc/1/stat":              "1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
				"proc/9/stat":              "9 (dbus-daemon) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
				"run/systemd/system/.keep": "", "run/dbus/.keep": "",
			})
			l, err := net.Listen("unix", filepath.Join(dir, busSocket))
			if err != nil {
				t.Fatal(err)
			}
			var conns sync.WaitGroup
			accepted := 0
			conns.Go(func() {
				for {
					c, err := l.Accept()
					if err != nil {
						return
					}
					accepted++
					conns.Go(func() {
						defer c.Close()
						serve(c)
					})
				}
			})
			h := openDir(t, dir)
			h.bus.patience = 150 * time.Millisecond
			held := heldAtMost(t)
			if units, err := h.Units(within(t, 400*time.Millisecond), "chrony.service"); err == nil {
				t.Errorf("it says %+v", units)
			}
			if err := h.FollowUnits(within(t, 400*time.Millisecond), []string{"chrony.service"}, Listener{Listening: func() { t.Error("it listens") }, Happened: func(string) { t.Error("something happened") }}); err == nil {
				t.Error("following it ended without an error")
			}
			if most := held(); most > 64<<20 {
				t.Errorf("%d MiB were held", most>>20)
			}
			h.Close()
			l.Close()
			conns.Wait() // the test hangs where a connection is kept
			if accepted == 0 {
				t.Error("nobody connected")
			}
		})
	}
}

// The stream passes on what is to be seen, wherever reads fall.
func TestBusStream(t *testing.T) {
	call := new(dbus.Message)
	answer, signal := busMessage(dbus.TypeMethodReply, call, "well"), busMessage(dbus.TypeSignal, nil)
	large := busMessage(dbus.TypeSignal, nil, strings.Repeat("x", maxBusSignal))
	all := bytes.Join([][]byte{signal, answer, large, busMessage(dbus.TypeMethodCall, nil), answer, signal}, nil)
	for signals, want := range map[bool][]byte{
		false: bytes.Join([][]byte{answer, answer}, nil),
		true:  bytes.Join([][]byte{signal, answer, answer, signal}, nil),
	} {
		for _, size := range []int{1, 7, 16, 4096} {
			near, far := net.Pipe()
			go func() {
				r := bufio.NewReader(far)
				r.ReadString('\n')
				far.Write(all)
				far.Close()
			}()
			s := newBusStream(near, signals)
			if _, err := s.Write([]byte("BEGIN\r\n")); err != nil {
				t.Fatal(err)
			}
			var got bytes.Buffer
			if _, err := io.CopyBuffer(struct{ io.Writer }{&got}, struct{ io.Reader }{s}, make([]byte, size)); err != nil && !errors.Is(err, io.EOF) {
				t.Fatal(err)
			}
			if !bytes.Equal(got.Bytes(), want) {
				t.Errorf("signals %t, reads of %d: %d bytes, want %d", signals, size, got.Len(), len(want))
			}
			near.Close()
		}
	}
}
