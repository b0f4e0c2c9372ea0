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
	paths    map[dbus.ObjectPath]bool
	// heard counts what was told: last of all units, and lastOf one.
	heard, last uint64
	lastOf      map[dbus.ObjectPath]uint64
	answers     map[string]unitAnswer
	pong        shared[*dbus.Conn]
	// mute is when systemd last did not say that it is there.
	mute time.Time
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
	// heard is what was told before it was last asked for its sign.
	heard uint64
}

const (
	// unitsKept is for what has no sign: a service may name another main
	// process without a change of its state (sd_notify(3), MAINPID=).
	unitsKept = 30 * time.Minute
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

// untold fills in what is remembered of a followed unit of which nothing was told
// since it was asked, and whose state is the same, without asking for its sign.
func (m *unitMemory) untold(path dbus.ObjectPath, u *Unit) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	known, ok := m.known[path]
	if !ok || m.signals == nil || !m.paths[path] || known.heard < max(m.last, m.lastOf[path]) || time.Since(known.at) >= unitsKept ||
		known.sign.load != u.Load || known.sign.active != u.Active || known.sign.sub != u.Sub {
		return false
	}
	was := known.unit
	was.Name, was.ID, was.Job = u.Name, u.ID, u.Job
	*u = was
	return true
}

// keep remembers a unit that was asked just now; heard is what was told before.
func (m *unitMemory) keep(path dbus.ObjectPath, sign unitSign, u Unit, heard uint64) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if known, ok := m.known[path]; ok && known.sign == sign && time.Since(known.at) < unitsKept {
		known.heard, known.unit.FileState = heard, u.FileState
		m.known[path] = known
		return
	}
	if m.known == nil || len(m.known) >= maxUnitsKept {
		m.known = map[dbus.ObjectPath]knownUnit{}
	}
	m.known[path] = knownUnit{u, sign, time.Now(), heard}
}

// listening says that changes of the units with these paths and names are told on c
// from now on.
func (m *unitMemory) listening(c *dbus.Conn, units map[dbus.ObjectPath][]string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.signals, m.followed, m.paths = c, map[string]bool{}, make(map[dbus.ObjectPath]bool, len(units))
	for path, names := range units {
		m.paths[path] = true
		for _, name := range names {
			m.followed[name] = true
		}
	}
	m.toldOfAll()
}

// deaf says that they are no longer told there.
func (m *unitMemory) deaf(c *dbus.Conn) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.signals == c {
		m.signals, m.followed, m.paths, m.answers = nil, nil, nil, nil
	}
	m.toldOfAll()
}

// told says that something about a followed unit has changed, or may have; about
// any of them without a path.
func (m *unitMemory) told(path dbus.ObjectPath) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if path == "" {
		m.toldOfAll()
		return
	}
	m.heard++
	if m.lastOf == nil {
		m.lastOf = map[dbus.ObjectPath]uint64{}
	}
	m.lastOf[path] = m.heard
}

func (m *unitMemory) toldOfAll() {
	m.heard++
	m.last = m.heard
	clear(m.lastOf)
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
// "systemctl enable --no-reload", another main process. all is true when systemd
// said so, and what it told of each unit is known; ok when there is an answer.
func (m *unitMemory) recallAnswer(ctx context.Context, calls *flights, what string) (units []Unit, ok, all bool) {
	began, pass := ctx.Value(asOfKey{}).(time.Time)
	if !pass {
		return nil, false, false // who has just changed a unit wants to see it
	}
	m.mu.Lock()
	c, known, mute := m.signals, m.answers[what], m.mute
	m.mu.Unlock()
	// Each question of the pass would wait as long for nothing.
	if c == nil || mute.After(began) {
		return nil, false, false
	}
	answered, err := m.pong.get(ctx, calls, "systemd's signals", func() (*dbus.Conn, error) {
		ctx, cancel := context.WithTimeout(ctx, busPatience)
		defer cancel()
		return c, c.Object(systemdName, systemdPath).CallWithContext(ctx, "org.freedesktop.DBus.Peer.Ping", dbus.FlagNoAutoStart).Err
	})
	m.mu.Lock()
	defer m.mu.Unlock()
	if err != nil {
		m.mute = time.Now()
		return nil, false, false
	}
	all = answered == c && m.signals == c
	if !all || known.at.IsZero() || time.Since(known.at) >= unitsKept || m.heard != known.heard {
		return nil, false, all
	}
	return slices.Clone(known.units), true, true
}
