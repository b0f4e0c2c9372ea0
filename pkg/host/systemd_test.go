package host

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
	"golang.org/x/sys/unix"
)

// busHost is a tree in which systemd is PID 1, with a real message bus.
type busHost struct {
	*Host
	dir    string
	daemon *exec.Cmd
}

const busConfig = `<!DOCTYPE busconfig PUBLIC "-//freedesktop//DTD D-Bus Bus Configuration 1.0//EN" "http://www.freedesktop.org/standards/dbus/1.0/busconfig.dtd">
<busconfig>
  <type>session</type>
  <listen>unix:path=%s</listen>
  <auth>EXTERNAL</auth>
  <servicedir>%s</servicedir>
  <policy context="default">
    <allow send_destination="*" eavesdrop="true"/>
    <allow own="*"/>
    <allow eavesdrop="true"/>
  </policy>
  <limit name="max_replies_per_connection">128</limit>
</busconfig>
`

func newBusHost(t testing.TB) *busHost {
	t.Helper()
	b := &busHost{dir: t.TempDir()}
	writeTree(t, b.dir, map[string]string{
		"proc/1/comm":                       "systemd\n",
		"proc/1/stat":                       "1 (systemd) S 0 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
		"proc/9/stat":                       "9 (dbus-daemon) S 1 1 1 0 -1 4194560 0 0 0 0 0 0 0 0 20 0 1 0 15 0 0 0\n",
		"run/systemd/system/.keep":          "",
		"services/org.example.Lazy.service": "[D-BUS Service]\nName=org.example.Lazy\nExec=/usr/bin/touch " + filepath.Join(b.dir, "activated") + "\n",
	})
	b.startBus(t)
	b.Host = openDir(t, b.dir)
	return b
}

func (b *busHost) startBus(t testing.TB) {
	t.Helper()
	daemon, err := exec.LookPath("dbus-daemon")
	if err != nil {
		t.Skip("needs dbus-daemon")
	}
	socket := filepath.Join(b.dir, busSocket)
	os.Remove(socket)
	writeTree(t, b.dir, map[string]string{
		"run/dbus/.keep": "",
		"bus.conf":       fmt.Sprintf(busConfig, socket, filepath.Join(b.dir, "services")),
	})
	b.daemon = exec.Command(daemon, "--nofork", "--nopidfile", "--print-address", "--config-file="+filepath.Join(b.dir, "bus.conf"))
	out, err := b.daemon.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := b.daemon.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.stopBus)
	if _, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		t.Fatal(err)
	}
}

func (b *busHost) stopBus() {
	b.daemon.Process.Signal(unix.SIGCONT)
	b.daemon.Process.Kill()
	b.daemon.Wait()
}

// serve connects something to the bus under a name.
func (b *busHost) serve(t testing.TB, name string, export func(*dbus.Conn)) *dbus.Conn {
	t.Helper()
	c, err := dbus.Connect("unix:path=" + filepath.Join(b.dir, busSocket))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	export(c)
	if name != "" {
		if r, err := c.RequestName(name, 0); err != nil || r != dbus.RequestNameReplyPrimaryOwner {
			t.Fatal(r, err)
		}
	}
	return c
}

// fakeManager answers what the agent asks of systemd, in systemd's types.
type fakeManager struct {
	mu    sync.Mutex
	props map[string]dbus.Variant
	asked []string
}

type listedUnit struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

const unitDir = "/org/freedesktop/systemd1/unit/"

func (m *fakeManager) list(name string) listedUnit {
	u := listedUnit{Name: name, Description: "d", Load: "not-found", Active: "inactive", Sub: "dead", Path: unitDir + "absent", JobPath: "/"}
	switch name {
	case "chrony.service", "chronyd.service":
		u.Name, u.Load, u.Active, u.Sub, u.Path = "chrony.service", "loaded", "active", "running", unitDir+"chrony_2eservice"
		u.JobID, u.JobType, u.JobPath = 7, "restart", "/org/freedesktop/systemd1/job/7"
	case "data.mount":
		u.Load, u.Active, u.Sub, u.Path = "loaded", "active", "mounted", unitDir+"data_2emount"
	}
	return u
}

func (m *fakeManager) ListUnitsByNames(names []string) ([]listedUnit, *dbus.Error) {
	var out []listedUnit
	for _, n := range names {
		out = append(out, m.list(n))
	}
	return out, nil
}

func (m *fakeManager) ListUnitsByPatterns(states, patterns []string) ([]listedUnit, *dbus.Error) {
	var out []listedUnit
	for _, n := range []string{"chrony.service", "data.mount"} {
		for _, p := range patterns {
			if ok, _ := filepath.Match(p, n); ok {
				out = append(out, m.list(n))
			}
		}
	}
	return out, nil
}

type fakeProperties struct {
	m      *fakeManager
	object string
}

func (p fakeProperties) Get(iface, name string) (dbus.Variant, *dbus.Error) {
	key := p.object + " " + strings.TrimPrefix(iface, systemdName+".") + " " + name
	p.m.mu.Lock()
	defer p.m.mu.Unlock()
	p.m.asked = append(p.m.asked, key)
	v, ok := p.m.props[key]
	if !ok {
		return v, dbus.NewError("org.freedesktop.DBus.Error.UnknownProperty", []any{"Unknown property " + name})
	}
	return v, nil
}

func exportManager(c *dbus.Conn) *fakeManager {
	v := dbus.MakeVariant
	m := &fakeManager{props: map[string]dbus.Variant{
		"manager Manager SystemState":      v("degraded"),
		"chrony Unit UnitFileState":        v("enabled"),
		"chrony Unit FragmentPath":         v("/usr/lib/systemd/system/chrony.service"),
		"chrony Unit ActiveEnterTimestamp": v(uint64(1763762496123456)),
		"chrony Unit ActiveExitTimestamp":  v(uint64(0)),
		"chrony Service Result":            v("success"),
		"chrony Service MainPID":           v(uint32(712)),
		"chrony Service NRestarts":         v(uint32(3)),
		"chrony Service OOMScoreAdjust":    v(int32(-500)),
		"chrony Service ControlGroup":      v("/system.slice/chrony.service"),
		"data Unit UnitFileState":          v("generated"),
		"data Unit FragmentPath":           v("/run/systemd/generator/data.mount"),
		"data Unit ActiveEnterTimestamp":   v(uint64(1763762496000000)),
		"data Unit ActiveExitTimestamp":    v(uint64(1763762490000000)),
		"data Mount What":                  v("/dev/sdb1"),
		"data Mount Where":                 v("/data"),
		"data Mount Result":                v("success"),
	}}
	const properties = "org.freedesktop.DBus.Properties"
	c.Export(m, systemdPath, systemdManager)
	c.Export(fakeProperties{m, "manager"}, systemdPath, properties)
	c.Export(fakeProperties{m, "chrony"}, unitDir+"chrony_2eservice", properties)
	c.Export(fakeProperties{m, "data"}, unitDir+"data_2emount", properties)
	return m
}

func wantUnits() (chrony, data Unit) {
	chrony = Unit{Name: "chrony.service", ID: "chrony.service", Load: "loaded", Active: "active", Sub: "running", FileState: "enabled", Job: true,
		Result: "success", MainPID: 712, NRestarts: 3, OOMScoreAdjust: -500, ControlGroup: "/system.slice/chrony.service",
		ActiveSince: time.UnixMicro(1763762496123456), FragmentPath: "/usr/lib/systemd/system/chrony.service"}
	data = Unit{Name: "data.mount", ID: "data.mount", Load: "loaded", Active: "active", Sub: "mounted", FileState: "generated", Result: "success",
		ActiveSince: time.UnixMicro(1763762496000000), InactiveSince: time.UnixMicro(1763762490000000),
		FragmentPath: "/run/systemd/generator/data.mount", What: "/dev/sdb1", Where: "/data"}
	return chrony, data
}

func TestSystemdOverTheBus(t *testing.T) {
	b := newBusHost(t)
	var m *fakeManager
	b.serve(t, systemdName, func(c *dbus.Conn) { m = exportManager(c) })
	ctx := within(t, 20*time.Second)

	if state, err := b.SystemState(ctx); state != "degraded" || err != nil {
		t.Errorf("SystemState = %q, %v", state, err)
	}
	chrony, data := wantUnits()
	alias := chrony
	alias.Name = "chronyd.service"
	absent := Unit{Name: "ntpd.service", ID: "ntpd.service", Load: "not-found", Active: "inactive", Sub: "dead"}
	got, err := b.Units(ctx, "ntpd.service", "chronyd.service", "data.mount")
	if diff := cmp.Diff([]Unit{absent, alias, data}, got); diff != "" || err != nil {
		t.Errorf("Units: %v\n%s", err, diff)
	}
	m.mu.Lock()
	for _, q := range m.asked {
		if strings.Contains(q, "absent") {
			t.Errorf("asked for a property of a unit that does not exist: %s", q)
		}
	}
	m.mu.Unlock()
	got, err = b.UnitsMatching(ctx, "chrony*", "*.mount")
	if diff := cmp.Diff([]Unit{chrony, data}, got); diff != "" || err != nil {
		t.Errorf("UnitsMatching: %v\n%s", err, diff)
	}
	for _, bad := range []string{"", "chrony", "a b.service", "../x.service", "x.exe", "@.service", "getty@.service", strings.Repeat("x", 300) + ".service"} {
		if _, err := b.Units(ctx, bad); err == nil {
			t.Errorf("%q was taken for a unit name", bad)
		}
	}
	for _, good := range []string{"getty@tty1.service", `dev-disk-by\x2did-x.device`, "-.mount", "a:b_c.slice"} {
		if !validUnit(good) {
			t.Errorf("%q was not taken for a unit name", good)
		}
	}
}

// TestUnitsAreRemembered: of a unit that has not changed only the sign of that is
// asked again, and what has changed is seen in the next look.
func TestUnitsAreRemembered(t *testing.T) {
	b := newBusHost(t)
	var m *fakeManager
	b.serve(t, systemdName, func(c *dbus.Conn) { m = exportManager(c) })
	ctx := within(t, 20*time.Second)
	set := func(key string, v any) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.props[key] = dbus.MakeVariant(v)
	}
	look := func(want Unit) (questions int) {
		t.Helper()
		m.mu.Lock()
		m.asked = nil
		m.mu.Unlock()
		got, err := b.Units(ctx, "chrony.service")
		if diff := cmp.Diff([]Unit{want}, got); diff != "" || err != nil {
			t.Errorf("%v\n%s", err, diff)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		return len(m.asked)
	}
	chrony, _ := wantUnits()
	// A systemd that does not tell when it loaded the units, before 248.
	if first, second := look(chrony), look(chrony); first != second {
		t.Errorf("without a sign %d questions, then %d", first, second)
	}
	set("manager Manager UnitsLoadTimestampMonotonic", uint64(100))
	set("chrony Unit StateChangeTimestampMonotonic", uint64(200))
	look(chrony)
	if n := look(chrony); n != 3 {
		t.Errorf("%d questions about a unit that has not changed, want 3: %q", n, m.asked)
	}
	chrony.FileState = "disabled"
	set("chrony Unit UnitFileState", chrony.FileState)
	look(chrony)
	chrony.MainPID, chrony.NRestarts = 4711, 4
	set("chrony Service MainPID", uint32(chrony.MainPID))
	set("chrony Service NRestarts", uint32(chrony.NRestarts))
	set("chrony Unit StateChangeTimestampMonotonic", uint64(201))
	look(chrony)
	chrony.OOMScoreAdjust = -900
	set("chrony Service OOMScoreAdjust", int32(chrony.OOMScoreAdjust))
	set("manager Manager UnitsLoadTimestampMonotonic", uint64(101))
	look(chrony)
	if n := look(chrony); n != 3 {
		t.Errorf("%d questions in the end, want 3: %q", n, m.asked)
	}
	b.bus.units.mu.Lock()
	for path, k := range b.bus.units.known {
		k.at = k.at.Add(-unitsKept)
		b.bus.units.known[path] = k
	}
	b.bus.units.mu.Unlock()
	if n := look(chrony); n == 3 {
		t.Error("what has no sign is not asked again after half an hour")
	}
	if n := look(chrony); n != 3 {
		t.Errorf("%d questions after that, want 3", n)
	}
}

// TestManyAskSystemd: all probes may ask at once, and a system bus refuses a
// connection that awaits more than 128 answers.
func TestManyAskSystemd(t *testing.T) {
	b := newBusHost(t)
	b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	ctx := within(t, 20*time.Second)
	names := slices.Repeat([]string{"chrony.service"}, 30)
	var asking sync.WaitGroup
	for range 9 {
		asking.Go(func() {
			if got, err := b.Units(ctx, names...); err != nil || len(got) != len(names) {
				t.Errorf("%d units, %v", len(got), err)
			}
		})
	}
	asking.Wait()
}

// TestBusRestart: the bus goes away and comes back, and nobody has to know.
func TestBusRestart(t *testing.T) {
	b := newBusHost(t)
	b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	ctx := within(t, 20*time.Second)
	if _, err := b.SystemState(ctx); err != nil {
		t.Fatal(err)
	}
	b.stopBus()
	b.startBus(t)
	b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	if state, err := b.SystemState(ctx); state != "degraded" || err != nil {
		t.Errorf("after the restart: %q, %v", state, err)
	}
	b.stopBus()
	if _, err := b.SystemState(ctx); err == nil || errors.Is(err, ErrNoSystemd) {
		t.Errorf("with the bus dead: %v", err)
	}
}

// TestPrivateSocket: systemd answers past a bus that is down. The peer there
// speaks no Hello.
func TestPrivateSocket(t *testing.T) {
	needsRoot(t)
	b := newBusHost(t)
	b.stopBus()
	servePrivate(t, filepath.Join(b.dir, privateSocket))
	ctx := within(t, 20*time.Second)
	if state, err := b.SystemState(ctx); state != "degraded" || err != nil {
		t.Errorf("SystemState = %q, %v", state, err)
	}
	chrony, _ := wantUnits()
	got, err := b.Units(ctx, "chrony.service")
	if diff := cmp.Diff([]Unit{chrony}, got); diff != "" || err != nil {
		t.Errorf("Units: %v\n%s", err, diff)
	}
	// The bus itself is not started by asking for it: its socket may be systemd's.
	l, err := net.Listen("unix", filepath.Join(b.dir, "listener"))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := os.Rename(filepath.Join(b.dir, "listener"), filepath.Join(b.dir, busSocket)); err != nil {
		t.Fatal(err)
	}
	if err := os.RemoveAll(filepath.Join(b.dir, "proc/9")); err != nil {
		t.Fatal(err)
	}
	b.table = processTable{}
	if _, err := b.SystemState(ctx); err != nil {
		t.Error(err)
	}
	l.(*net.UnixListener).SetDeadline(time.Now().Add(50 * time.Millisecond))
	if _, err := l.Accept(); err == nil {
		t.Error("the socket of a bus that is not running was connected to, which starts it")
	}
	if _, _, err := b.BusProperties(ctx, "org.example", "/", "x"); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("BusProperties without a bus: %v", err)
	}
}

// servePrivate plays systemd's private socket: both ends are clients to this
// library, so each gets its handshake from here, and then they talk. The
// connections made are systemd's ends.
func servePrivate(t *testing.T, name string) (conns <-chan *dbus.Conn) {
	t.Helper()
	l, err := net.Listen("unix", name)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	made := make(chan *dbus.Conn, 8)
	go func() {
		for {
			agent, err := l.Accept()
			if err != nil {
				return
			}
			near, far := net.Pipe()
			go func() {
				defer agent.Close()
				defer far.Close()
				a, err := handshake(agent)
				if err != nil {
					return
				}
				b, err := handshake(far)
				if err != nil {
					return
				}
				go io.Copy(far, a)
				io.Copy(agent, b)
			}()
			c, err := dbus.NewConn(near)
			if err != nil {
				return
			}
			exportManager(c)
			if err := c.Auth([]dbus.Auth{dbus.AuthExternal("0")}); err != nil {
				return
			}
			made <- c
		}
	}()
	return made
}

// handshake is the server's side of the D-Bus specification's authentication.
func handshake(c net.Conn) (*bufio.Reader, error) {
	r := bufio.NewReader(c)
	if _, err := r.ReadByte(); err != nil {
		return nil, err
	}
	for {
		line, err := r.ReadString('\n')
		if err != nil {
			return nil, err
		}
		switch {
		case line == "BEGIN\r\n":
			return r, nil
		case line == "AUTH EXTERNAL 30\r\n", strings.HasPrefix(line, "DATA"): // "0", in hex
			_, err = fmt.Fprint(c, "OK 0123456789abcdef0123456789abcdef\r\n")
		case line == "AUTH EXTERNAL\r\n":
			_, err = fmt.Fprint(c, "DATA\r\n")
		case line == "NEGOTIATE_UNIX_FD\r\n":
			_, err = fmt.Fprint(c, "ERROR\r\n")
		default:
			_, err = fmt.Fprint(c, "REJECTED EXTERNAL\r\n")
		}
		if err != nil {
			return nil, err
		}
	}
}

// TestSilentBus: a bus that stops answering costs the caller's time and no more,
// and serves again when it wakes.
func TestSilentBus(t *testing.T) {
	b := newBusHost(t)
	b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	if _, err := b.SystemState(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	b.daemon.Process.Signal(unix.SIGSTOP)
	for range 3 { // the open connection, then new ones
		if _, err := b.Units(within(t, 100*time.Millisecond), "chrony.service"); !errors.Is(err, ErrNoReply) {
			t.Error(err)
		}
	}
	// Past the bus systemd itself still answers.
	servePrivate(t, filepath.Join(b.dir, privateSocket))
	if state, err := b.SystemState(within(t, 2*time.Second)); os.Geteuid() == 0 && (state != "degraded" || err != nil) {
		t.Errorf("past the silent bus: %q, %v", state, err)
	}
	b.daemon.Process.Signal(unix.SIGCONT)
	b.bus.silent = time.Now().Add(-2 * busRest)
	if state, err := b.SystemState(within(t, 10*time.Second)); state != "degraded" || err != nil {
		t.Errorf("awake again: %q, %v", state, err)
	}
}

// TestPastASilentBus: a bus that stops answering is gone past within the question
// that finds it out, and not asked by the next; a systemd that answers late is
// waited for.
func TestPastASilentBus(t *testing.T) {
	needsRoot(t)
	b := newBusHost(t)
	b.bus.patience = 200 * time.Millisecond
	manager := make(chan *fakeManager, 1)
	b.serve(t, systemdName, func(c *dbus.Conn) { manager <- exportManager(c) })
	m := <-manager
	if _, err := b.SystemState(within(t, 10*time.Second)); err != nil {
		t.Fatal(err)
	}
	m.mu.Lock() // it answers nothing
	answered := make(chan error)
	go func() {
		_, err := b.SystemState(within(t, 20*time.Second))
		answered <- err
	}()
	select {
	case err := <-answered:
		t.Fatalf("answered, with %v, while systemd did not", err)
	case <-time.After(5 * b.bus.patience):
	}
	m.mu.Unlock()
	if err := <-answered; err != nil || b.bus.silence() != nil {
		t.Fatalf("a slow systemd: %v; silence: %v", err, b.bus.silence())
	}

	servePrivate(t, filepath.Join(b.dir, privateSocket))
	b.daemon.Process.Signal(unix.SIGSTOP)
	chrony, _ := wantUnits()
	for range 2 {
		got, err := b.Units(within(t, time.Minute), "chrony.service")
		if diff := cmp.Diff([]Unit{chrony}, got); diff != "" || err != nil {
			t.Errorf("Units: %v\n%s", err, diff)
		}
		if b.bus.silence() == nil || b.bus.private == nil {
			t.Error("the bus is not known to be silent")
		}
	}
	b.daemon.Process.Signal(unix.SIGCONT)
	b.bus.silent = time.Now().Add(-2 * busRest)
	if state, err := b.SystemState(within(t, 10*time.Second)); state != "degraded" || err != nil {
		t.Errorf("awake again: %q, %v", state, err)
	}
	if b.bus.private != nil {
		t.Error("the connection past the bus is kept, and is sent every signal")
	}
}

func TestBusProperties(t *testing.T) {
	b := newBusHost(t)
	ctx := within(t, 20*time.Second)
	const name = "org.example.Time"
	b.serve(t, name, func(c *dbus.Conn) {
		c.Export(allProperties{
			"Text": "x", "Yes": true, "Byte": byte(7), "Small": int16(-2), "Word": uint16(65535), "Int": int32(-5), "Uint": uint32(5),
			"Long": int64(-1 << 40), "Micros": uint64(1763762496123456), "Real": 1.5, "Path": dbus.ObjectPath("/a"),
			"Servers": []string{"a", "b"}, "Refid": []byte{127, 0, 0, 1}, "Nested": dbus.MakeVariant(dbus.MakeVariant(int32(1))),
			"Struct": struct {
				A int32
				B []byte
				C bool
			}{2, []byte{192, 0, 2, 1}, true},
			"Map": map[string]uint32{"k": 1}, "Numbers": map[uint32]string{9: "nine"},
		}, "/t", "org.freedesktop.DBus.Properties")
	})
	got, ok, err := b.BusProperties(ctx, name, "/t", "org.example.Iface")
	if err != nil || !ok {
		t.Fatal(ok, err)
	}
	text, err := json.Marshal(got)
	if err != nil {
		t.Fatal(err)
	}
	// What encoding/json makes of it and back is what we have.
	var back map[string]any
	if err := json.Unmarshal(text, &back); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(back, got); diff != "" {
		t.Error(diff)
	}
	want := map[string]any{"Text": "x", "Yes": true, "Byte": 7.0, "Small": -2.0, "Word": 65535.0, "Int": -5.0, "Uint": 5.0,
		"Long": float64(-1 << 40), "Micros": 1763762496123456.0, "Real": 1.5, "Path": "/a", "Servers": []any{"a", "b"},
		"Refid": []any{127.0, 0.0, 0.0, 1.0}, "Nested": 1.0, "Struct": []any{2.0, []any{192.0, 0.0, 2.0, 1.0}, true},
		"Map": map[string]any{"k": 1.0}, "Numbers": map[string]any{"9": "nine"}}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	if _, _, err := b.BusProperties(ctx, name, "/elsewhere", "x"); err == nil {
		t.Error("an object that does not exist has properties")
	}

	// Nobody owns it, and the bus would start it on demand.
	if _, ok, err := b.BusProperties(ctx, "org.example.Lazy", "/", "x"); ok || err != nil {
		t.Errorf("a name nobody owns: %v, %v", ok, err)
	}
	time.Sleep(200 * time.Millisecond)
	if _, err := os.Stat(filepath.Join(b.dir, "activated")); err == nil {
		t.Error("asking for a service started it")
	}
	// The trap is live: a plain call does start it.
	plainConn := b.serve(t, "", func(*dbus.Conn) {})
	plainConn.Object("org.example.Lazy", "/").Go("org.example.X", 0, nil)
	eventually(t, "a call without our care starts the service", func() bool {
		_, err := os.Stat(filepath.Join(b.dir, "activated"))
		return err == nil
	})
}

type allProperties map[string]any

func (p allProperties) GetAll(iface string) (map[string]dbus.Variant, *dbus.Error) {
	out := map[string]dbus.Variant{}
	for k, v := range p {
		if inner, ok := v.(dbus.Variant); ok {
			out[k] = inner
		} else {
			out[k] = dbus.MakeVariant(v)
		}
	}
	return out, nil
}

func TestNoSystemd(t *testing.T) {
	ctx := within(t, 10*time.Second)
	for name, files := range map[string]map[string]string{
		"another init":  {"proc/1/comm": "init\n", "run/systemd/system/.keep": ""},
		"only its name": {"proc/1/comm": "systemd\n"},
		"Talos":         {"proc/1/comm": "machined\n"},
	} {
		dir := t.TempDir()
		writeTree(t, dir, files)
		h := openDir(t, dir)
		_, err1 := h.SystemState(ctx)
		_, err2 := h.Units(ctx, "x.service")
		_, err3 := h.UnitsMatching(ctx, "*")
		_, err4 := h.Units(ctx)
		for _, err := range []error{err1, err2, err3, err4} {
			if !errors.Is(err, ErrNoSystemd) {
				t.Errorf("%s: %v, want ErrNoSystemd", name, err)
			}
		}
		if _, ok, err := h.BusProperties(ctx, "org.example", "/", "x"); ok || err != nil {
			t.Errorf("%s: BusProperties without a bus: %v, %v", name, ok, err)
		}
	}
}

func BenchmarkUnits(b *testing.B) {
	h := newBusHost(b)
	h.serve(b, systemdName, func(c *dbus.Conn) { exportManager(c) })
	names := make([]string, 20)
	for i := range names {
		names[i] = []string{"chrony.service", "absent.service"}[i%2]
	}
	b.ReportAllocs()
	for b.Loop() {
		if _, err := h.Units(context.Background(), names...); err != nil {
			b.Fatal(err)
		}
	}
}
