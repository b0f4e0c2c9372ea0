package host

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
	"github.com/google/go-cmp/cmp"
)

// Subscribe is systemd's; the signals of the tests go to everybody with a match.
func (m *fakeManager) Subscribe() *dbus.Error { return nil }

// changes emits what systemd does when a unit changes.
func changes(t testing.TB, c *dbus.Conn, path string, job uint32, active string) func() {
	return func() {
		t.Helper()
		type reference struct {
			ID   uint32
			Path dbus.ObjectPath
		}
		err := c.Emit(dbus.ObjectPath(unitDir+path), "org.freedesktop.DBus.Properties.PropertiesChanged", unitInterface,
			map[string]dbus.Variant{"ActiveState": dbus.MakeVariant(active), "Job": dbus.MakeVariant(reference{job, "/"})}, []string{"Conditions"})
		if err != nil {
			t.Fatal(err)
		}
	}
}

func TestFollowUnits(t *testing.T) {
	b := newBusHost(t)
	c := b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	heard := follow(t, func(ctx context.Context, l Listener) error {
		// By an alias as well; the second does not exist yet.
		return b.FollowUnits(ctx, []string{"chronyd.service", "ntpd.service"}, l)
	})
	const chronyd, ntpd = "chronyd.service", "ntpd.service"
	heard.hears(t, chronyd, changes(t, c, "chrony_2eservice", 0, "inactive"))
	heard.hears(t, ntpd, changes(t, c, "absent", 0, "active"))
	manager := func(member string, args ...any) func() {
		return func() {
			if err := c.Emit(systemdPath, systemdManager+"."+member, args...); err != nil {
				t.Fatal(err)
			}
		}
	}
	heard.hears(t, UnitFiles, manager("Reloading", false))
	heard.hears(t, UnitFiles, manager("UnitFilesChanged"))
	// What is not asked for, or not settled, is silence: a pod's scope, a unit
	// on its way down or with a job.
	heard.hearsNothing(t, func() {
		changes(t, c, "cri_2dcontainerd_2d12_2escope", 0, "active")()
		changes(t, c, "data_2emount", 0, "active")()
		changes(t, c, "chrony_2eservice", 7, "active")()
		changes(t, c, "chrony_2eservice", 0, "deactivating")()
		manager("Reloading", true)()
		manager("JobNew", uint32(7), dbus.ObjectPath("/"), chronyd)()
	}, chronyd, changes(t, c, "chrony_2eservice", 0, "failed"))

	// systemd comes back on the bus with no memory of subscribers.
	if _, err := c.ReleaseName(systemdName); err != nil {
		t.Fatal(err)
	}
	heard.hears(t, UnitFiles, func() {
		if _, err := c.RequestName(systemdName, 0); err != nil {
			t.Fatal(err)
		}
	})
	if got := heard.all(); !slices.Contains(got[len(got)-3:], ntpd) {
		t.Errorf("after systemd came back: %q", got)
	}
	heard.endsWithContext(t)
}

// The bus goes away: the source ends, says so, and can be begun anew.
func TestFollowUnitsEndsWithTheBus(t *testing.T) {
	b := newBusHost(t)
	b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	source := func(ctx context.Context, l Listener) error { return b.FollowUnits(ctx, []string{"chrony.service"}, l) }
	heard := follow(t, source)
	b.stopBus()
	select {
	case <-heard.ended:
	case <-time.After(10 * time.Second):
		t.Fatal("it waits for a bus that is gone")
	}
	if !errors.Is(heard.err, errEnded) {
		t.Errorf("it ended with %v", heard.err)
	}
	b.startBus(t)
	c := b.serve(t, systemdName, func(c *dbus.Conn) { exportManager(c) })
	heard = follow(t, source)
	heard.hears(t, "chrony.service", changes(t, c, "chrony_2eservice", 0, "active"))
}

// Past a bus that is down, signals come over systemd's own socket.
func TestFollowUnitsOnThePrivateSocket(t *testing.T) {
	needsRoot(t)
	b := newBusHost(t)
	b.stopBus()
	conns := servePrivate(t, filepath.Join(b.dir, privateSocket))
	heard := follow(t, func(ctx context.Context, l Listener) error { return b.FollowUnits(ctx, []string{"chrony.service"}, l) })
	c := <-conns
	heard.hears(t, "chrony.service", changes(t, c, "chrony_2eservice", 0, "active"))
	heard.hearsNothing(t, changes(t, c, "data_2emount", 0, "active"), "chrony.service", changes(t, c, "chrony_2eservice", 0, "inactive"))
}

func TestFollowUnitsElsewhere(t *testing.T) {
	dir := t.TempDir()
	writeTree(t, dir, map[string]string{"proc/1/comm": "openrc-init\n"})
	h := openDir(t, dir)
	if err := h.FollowUnits(t.Context(), []string{"chrony.service"}, Listener{}); !errors.Is(err, ErrNoSystemd) {
		t.Errorf("got %v", err)
	}
}

func TestUnitSettled(t *testing.T) {
	job := func(id uint32) dbus.Variant { return dbus.MakeVariant([]any{id, dbus.ObjectPath("/")}) }
	active := func(s string) map[string]dbus.Variant {
		return map[string]dbus.Variant{"ActiveState": dbus.MakeVariant(s), "Job": job(0)}
	}
	for i, c := range []struct {
		body []any
		want bool
	}{
		{[]any{unitInterface, active("failed"), []string{}}, true},
		{[]any{unitInterface, active("activating"), []string{}}, true},
		{[]any{unitInterface, active("deactivating"), []string{}}, false},
		{[]any{unitInterface, map[string]dbus.Variant{"ActiveState": dbus.MakeVariant("active"), "Job": job(3)}, []string{}}, false},
		{[]any{unitInterface, map[string]dbus.Variant{}, []string{}}, true},
		{[]any{systemdName + ".Service", active("failed"), []string{}}, false},
		{[]any{unitInterface, "nonsense"}, false},
		{nil, false},
	} {
		if got := unitSettled(c.body); got != c.want {
			t.Error(fmt.Sprint(i), c.body, got)
		}
	}
}

// TestFollowedUnitsAreNotAskedAgain: in a pass systemd is asked about units whose
// changes it tells only after it has told one, and by others always.
func TestFollowedUnitsAreNotAskedAgain(t *testing.T) {
	b := newBusHost(t)
	var m *fakeManager
	c := b.serve(t, systemdName, func(c *dbus.Conn) { m = exportManager(c) })
	ctx := within(t, 20*time.Second)
	const chrony = "chrony.service"
	look := func(ctx context.Context, names ...string) (pid, questions int) {
		t.Helper()
		m.mu.Lock()
		m.asked = nil
		m.mu.Unlock()
		got, err := b.Units(ctx, names...)
		if err != nil || len(got) != len(names) {
			t.Fatalf("%d units, %v", len(got), err)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		pid, questions = got[0].MainPID, len(m.asked)
		got[0] = Unit{} // whoever asks may do with the answer what he likes
		return pid, questions
	}
	pass := func() context.Context { return AsOf(ctx, time.Now()) }
	asked := func(why string, want bool, ctx context.Context, names ...string) {
		t.Helper()
		if _, n := look(ctx, names...); n > 0 != want {
			t.Errorf("%s: %d questions: %q", why, n, m.asked)
		}
	}
	asked("nobody listens", true, pass(), chrony)
	asked("still nobody", true, pass(), chrony)

	following, stop := context.WithCancel(ctx)
	heard := follow(t, func(_ context.Context, l Listener) error {
		return b.FollowUnits(following, []string{chrony, "ntpd.service"}, l)
	})
	asked("the first look", true, pass(), chrony)
	asked("the second", false, pass(), chrony)
	asked("no pass", true, ctx, chrony)
	asked("another list", true, pass(), "ntpd.service", chrony)
	asked("the same again", false, pass(), "ntpd.service", chrony)
	asked("one that is not followed", true, pass(), chrony, "data.mount")
	asked("which stays so", true, pass(), chrony, "data.mount")

	// What systemd has sent is known before its answer, however late it is read.
	for i := range 100 {
		m.mu.Lock()
		m.props["chrony Service MainPID"] = dbus.MakeVariant(uint32(5000 + i))
		m.props["chrony Unit StateChangeTimestampMonotonic"] = dbus.MakeVariant(uint64(300 + i))
		m.props["manager Manager UnitsLoadTimestampMonotonic"] = dbus.MakeVariant(uint64(100))
		m.mu.Unlock()
		// A change that does not last wakes nobody, and counts all the same.
		changes(t, c, "chrony_2eservice", 7, "active")()
		if pid, _ := look(pass(), chrony); pid != 5000+i {
			t.Fatalf("look %d found PID %d", i, pid)
		}
	}
	asked("nothing since", false, pass(), chrony)
	b.bus.units.mu.Lock()
	for what, a := range b.bus.units.answers {
		a.at = a.at.Add(-unitsKept)
		b.bus.units.answers[what] = a
	}
	b.bus.units.mu.Unlock()
	asked("half an hour later", true, pass(), chrony)
	asked("right after", false, pass(), chrony)
	stop()
	<-heard.ended
	asked("nobody listens any more", true, pass(), chrony)
}

// TestOnlyTheUnitToldOfIsAsked: what is told of one unit is no reason to ask about
// the others.
func TestOnlyTheUnitToldOfIsAsked(t *testing.T) {
	b := newBusHost(t)
	var m *fakeManager
	c := b.serve(t, systemdName, func(c *dbus.Conn) { m = exportManager(c) })
	ctx := within(t, 20*time.Second)
	set := func(key string, v any) {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.props[key] = dbus.MakeVariant(v)
	}
	names := []string{"chrony.service", "data.mount"}
	follow(t, func(ctx context.Context, l Listener) error { return b.FollowUnits(ctx, names, l) })
	asked := func(why string, chrony, data bool) {
		t.Helper()
		m.mu.Lock()
		m.asked = nil
		m.mu.Unlock()
		got, err := b.Units(AsOf(ctx, time.Now()), names...)
		wantChrony, wantData := wantUnits()
		wantChrony.FileState = "disabled"
		if diff := cmp.Diff([]Unit{wantChrony, wantData}, got); diff != "" || err != nil {
			t.Errorf("%s: %v\n%s", why, err, diff)
		}
		m.mu.Lock()
		defer m.mu.Unlock()
		about := strings.Join(m.asked, "\n")
		if strings.Contains(about, "chrony ") != chrony || strings.Contains(about, "data ") != data {
			t.Errorf("%s: asked %q", why, m.asked)
		}
	}
	set("manager Manager UnitsLoadTimestampMonotonic", uint64(100))
	set("chrony Unit UnitFileState", "disabled")
	asked("the first time", true, true)
	asked("nothing has happened", false, false)
	changes(t, c, "data_2emount", 7, "active")()
	asked("told of the mount", false, true)
	changes(t, c, "chrony_2eservice", 7, "active")()
	asked("told of chrony", true, false)
	b.bus.units.mu.Lock()
	b.bus.units.answers = nil
	for path, k := range b.bus.units.known {
		if strings.Contains(string(path), "data") {
			k.sign.sub = "mounting"
		}
		b.bus.units.known[path] = k
	}
	b.bus.units.mu.Unlock()
	asked("the mount is in another state", false, true)
	if err := c.Emit(systemdPath, systemdManager+".UnitFilesChanged"); err != nil {
		t.Fatal(err)
	}
	asked("told of unit files", true, true)
}
