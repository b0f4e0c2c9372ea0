package host

import (
	"context"
	"slices"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

// unitSign says whether what was asked of a unit still holds: when its state last
// changed, which is at each start, stop and automatic restart, and when systemd
// last loaded unit files, both by its monotonic clock in microseconds. Zero is not
// known: an old systemd.
type unitSign struct {
	changed, loaded   uint64
	load, active, sub string
}

// unitMemory remembers units by their object paths, and whole answers for as long
// as systemd would have told if another one were due.
type unitMemory struct {
	mu    sync.Mutex
	known map[dbus.ObjectPath]knownUnit

	// signals is the connection on which systemd tells of the followed units;
	// nil while nobody listens.
	signals  *dbus.Conn
	followed map[string]bool
	// heard counts what was told.
	heard   uint64
	answers map[string]unitAnswer
	pong    shared[*dbus.Conn]
}

type unitAnswer struct {
	units []Unit
	heard uint64
	at    time.Time
}

type knownUnit struct {
	unit Unit
	sign unitSign
	at   time.Time
}

const (
	// unitsKept is for what has no sign: a service may name another main
	// process without a change of its state (sd_notify(3), MAINPID=).
	unitsKept = 10 * time.Minute
	// maxUnitsKept is far more than probes ask for, but for a host that has
	// thousands of mount units.
	maxUnitsKept = 4096
)

// recall fills in what is remembered of a unit; false says that it has to be asked.
func (m *unitMemory) recall(path dbus.ObjectPath, sign unitSign, u *Unit) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	known, ok := m.known[path]
	if !ok || sign != known.sign || sign.changed == 0 || sign.loaded == 0 || time.Since(known.at) >= unitsKept {
		return false
	}
	was := known.unit
	was.Name, was.ID, was.Job, was.FileState = u.Name, u.ID, u.Job, u.FileState
	*u = was
	return true
}

// keep remembers a unit that was asked just now, and is no news for one that is
// remembered already.
func (m *unitMemory) keep(path dbus.ObjectPath, sign unitSign, u Unit) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if known, ok := m.known[path]; ok && known.sign == sign && time.Since(known.at) < unitsKept {
		return
	}
	if m.known == nil || len(m.known) >= maxUnitsKept {
		m.known = map[dbus.ObjectPath]knownUnit{}
	}
	m.known[path] = knownUnit{u, sign, time.Now()}
}

// listening says that changes of the named units are told on c from now on.
func (m *unitMemory) listening(c *dbus.Conn, names []string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.signals, m.followed = c, make(map[string]bool, len(names))
	for _, name := range names {
		m.followed[name] = true
	}
	m.heard++
}

// deaf says that they are no longer told there.
func (m *unitMemory) deaf(c *dbus.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.signals == c {
		m.signals, m.followed, m.answers = nil, nil, nil
	}
	m.heard++
}

// told says that something about units has changed, or may have.
func (m *unitMemory) told() {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.heard++
}

func (m *unitMemory) heardSoFar() uint64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.heard
}

// keepAnswer remembers what systemd answered about units it tells of; heard is
// what was told before it was asked.
func (m *unitMemory) keepAnswer(what string, names []string, units []Unit, heard uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.signals == nil || m.heard != heard || slices.ContainsFunc(names, func(n string) bool { return !m.followed[n] }) {
		return
	}
	// Followed units are bounded, what is asked of them together is a few lists.
	const maxAnswers = 256
	if m.answers == nil || len(m.answers) >= maxAnswers {
		m.answers = map[string]unitAnswer{}
	}
	m.answers[what] = unitAnswer{slices.Clone(units), heard, time.Now()}
}

// recallAnswer returns what systemd would answer in a pass (see [AsOf]), without
// asking it about each unit: systemd says on the connection of the signals that it
// is there, once a pass, and what it sent before, which the bus keeps in order,
// has been heard then. What has no signal is up to unitsKept old: a link of
// "systemctl enable --no-reload", another main process.
func (m *unitMemory) recallAnswer(ctx context.Context, calls *flights, what string) ([]Unit, bool) {
	if _, pass := ctx.Value(asOfKey{}).(time.Time); !pass {
		return nil, false // who has just changed a unit wants to see it
	}
	m.mu.Lock()
	c, known := m.signals, m.answers[what]
	m.mu.Unlock()
	if c == nil || known.at.IsZero() || time.Since(known.at) >= unitsKept {
		return nil, false
	}
	answered, err := m.pong.get(ctx, calls, "systemd's signals", func() (*dbus.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, busPatience)
		defer cancel()
		return c, c.Object(systemdName, systemdPath).CallWithContext(ctx, "org.freedesktop.DBus.Peer.Ping", dbus.FlagNoAutoStart).Err
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.answers = nil // or each question of the pass would wait as long for nothing
		return nil, false
	}
	if answered != c || m.signals != c || m.heard != known.heard {
		return nil, false
	}
	return slices.Clone(known.units), true
}
