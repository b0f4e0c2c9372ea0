package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

const (
	busSocket     = "/run/dbus/system_bus_socket"
	privateSocket = "/run/systemd/private"

	systemdName    = "org.freedesktop.systemd1"
	systemdPath    = "/org/freedesktop/systemd1"
	systemdManager = systemdName + ".Manager"
	getProperty    = "org.freedesktop.DBus.Properties.Get"
)

// busLink holds the connections to the host's system bus and to systemd itself.
// They stay open and are made anew when they break. go-systemd's own connection
// is not used: it opens two, subscribes to signals, and can not mark a call as
// one that must start nothing.
type busLink struct {
	host *Host

	mu      sync.Mutex // never held during a call
	bus     *dbus.Conn
	private *dbus.Conn
	// silent is when the bus last gave no answer.
	silent   time.Time
	patience time.Duration // busPatience

	// batch is held by who asks many questions at a time.
	batch batchToken

	units unitMemory
}

// batchToken lets one batch of questions be under way at a time. A bus fails the
// questions of a connection that awaits more answers than it allows (128,
// max_replies_per_connection of dbus-daemon's system bus), and all probes may
// ask at once.
type batchToken struct {
	once sync.Once
	free chan struct{}
}

// take waits for the token until ctx ends; give gives it back.
func (b *batchToken) take(ctx context.Context) (give func(), err error) {
	b.once.Do(func() { b.free = make(chan struct{}, 1) })
	select {
	case b.free <- struct{}{}:
		return func() { <-b.free }, nil
	case <-ctx.Done():
		return nil, ctx.Err()
	}
}

func (l *busLink) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	for _, c := range []*dbus.Conn{l.bus, l.private} {
		if c != nil {
			c.Close()
		}
	}
	l.bus, l.private = nil, nil
}

// connect returns the open connection in *slot, or dials. Of two that dial at a
// time one connection is kept.
func (l *busLink) connect(ctx context.Context, slot **dbus.Conn, dial func(context.Context) (*dbus.Conn, error)) (*dbus.Conn, error) {
	l.mu.Lock()
	c := *slot
	l.mu.Unlock()
	if c != nil && c.Connected() {
		return c, nil
	}
	c, err := dial(ctx)
	if err != nil {
		return nil, err
	}
	l.mu.Lock()
	old := *slot
	if old != nil && old.Connected() {
		l.mu.Unlock()
		c.Close()
		return old, nil
	}
	*slot = c
	l.mu.Unlock()
	if old != nil {
		old.Close()
	}
	return c, nil
}

// open authenticates on the socket at name; hello says whether a bus or systemd
// itself is behind it. Without a handler signals are skipped.
func (l *busLink) open(ctx context.Context, name string, hello bool, signals dbus.SignalHandler) (*dbus.Conn, error) {
	return bound(ctx, &l.host.calls, name, func(c *dbus.Conn) { c.Close() }, func() (*dbus.Conn, error) {
		sock, err := l.host.dialPath(ctx, name)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		deadline, _ := ctx.Deadline()
		sock.SetDeadline(deadline)
		var options []dbus.ConnOption
		if signals != nil {
			options = append(options, dbus.WithSignalHandler(signals))
		}
		c, err := dbus.NewConn(newBusStream(sock, signals != nil), options...)
		if err != nil {
			sock.Close()
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		// By number: the user's name would be looked up in the image.
		err = c.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Geteuid()))})
		if err == nil && hello {
			err = c.Hello()
		}
		if err != nil {
			c.Close()
			if errors.Is(err, os.ErrDeadlineExceeded) {
				err = ErrNoReply
			}
			return nil, fmt.Errorf("%s: %w", name, err)
		}
		sock.SetDeadline(time.Time{})
		return c, nil
	})
}

// systemBus connects to the host's bus, if it is running: connecting to its
// socket would have systemd start it. fs.ErrNotExist means there is none.
func (l *busLink) systemBus(ctx context.Context) (*dbus.Conn, error) {
	return l.connect(ctx, &l.bus, func(ctx context.Context) (*dbus.Conn, error) {
		if _, err := l.host.Stat(ctx, busSocket); err != nil {
			return nil, err
		}
		if procs, err := l.host.Processes(ctx); err == nil {
			// A pod's process may take the name, and is no child of PID 1's.
			isBus := func(p Process) bool {
				return p.PPID == 1 && (p.Comm == "dbus-daemon" || strings.HasPrefix(p.Comm, "dbus-broker"))
			}
			if !slices.ContainsFunc(procs, isBus) { // one may have taken the name since it was read
				procs, err = l.host.ProcessesNow(ctx)
			}
			if err == nil && !slices.ContainsFunc(procs, isBus) {
				return nil, errors.New("the system bus is not running")
			}
		}
		return l.open(ctx, busSocket, true, nil)
	})
}

// systemd connects to PID 1: over the bus, and past it when it is down and we
// are root.
func (l *busLink) systemd(ctx context.Context) (*dbus.Conn, error) {
	if err := l.isInit(ctx); err != nil {
		return nil, err
	}
	if os.Geteuid() != 0 {
		return l.systemBus(ctx)
	}
	err := l.silence()
	if err == nil {
		var c *dbus.Conn
		busCtx, cancel, whole := l.patient(ctx)
		c, err = l.systemBus(busCtx)
		cancel()
		if err == nil {
			// What is connected to that socket is sent every signal.
			l.leavePrivate()
			return c, nil
		}
		if whole && errors.Is(err, ErrNoReply) {
			l.fellSilent()
		}
	}
	p, perr := l.connect(ctx, &l.private, func(ctx context.Context) (*dbus.Conn, error) {
		return l.open(ctx, privateSocket, false, nil)
	})
	if perr != nil {
		return nil, fmt.Errorf("systemd can not be asked: %w", errors.Join(err, perr))
	}
	return p, nil
}

const (
	// busPatience is how long the bus itself may take to answer where systemd
	// can be asked past it. It says nothing of how long systemd may take.
	busPatience = 3 * time.Second
	// busRest is how long a bus that gave no answer is not asked where systemd
	// can be asked past it: it would cost each probe the wait anew.
	busRest = 30 * time.Second
)

// patient leaves time to ask past a bus that hangs; whole says whether the bus
// has all the time it may take.
func (l *busLink) patient(ctx context.Context) (_ context.Context, cancel context.CancelFunc, whole bool) {
	limit := l.patience
	if deadline, ok := ctx.Deadline(); ok {
		limit = min(limit, time.Until(deadline)/2)
	}
	ctx, cancel = context.WithTimeout(ctx, limit)
	return ctx, cancel, limit == l.patience
}

// guard ends the calls made on the bus, by ending the context it returns, when
// the bus itself does not answer either.
func (l *busLink) guard(ctx context.Context, c *dbus.Conn) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancel(ctx)
	var mu sync.Mutex
	var timer *time.Timer
	look := func() {
		answered := make(chan struct{})
		go func() { // which may be stuck in writing until the connection is closed
			if c.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.Peer.Ping", 0).Err == nil {
				close(answered)
			}
		}()
		limit := time.NewTimer(l.patience)
		defer limit.Stop()
		select {
		case <-ctx.Done():
		case <-limit.C:
			cancel()
		case <-answered:
			mu.Lock()
			defer mu.Unlock()
			if ctx.Err() == nil {
				timer.Reset(l.patience)
			}
		}
	}
	mu.Lock()
	defer mu.Unlock()
	timer = time.AfterFunc(l.patience, look)
	return ctx, func() {
		mu.Lock()
		defer mu.Unlock()
		timer.Stop()
		cancel()
	}
}

// silence is why the bus is better not asked at present; nil when it may be.
func (l *busLink) silence() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.silent.IsZero() || time.Since(l.silent) > busRest {
		return nil
	}
	return fmt.Errorf("the system bus: %w %s ago", ErrNoReply, time.Since(l.silent).Round(time.Second))
}

func (l *busLink) fellSilent() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.silent = time.Now()
}

func (l *busLink) leavePrivate() {
	l.mu.Lock()
	c := l.private
	l.private, l.silent = nil, time.Time{}
	l.mu.Unlock()
	if c != nil {
		// After whoever still waits for an answer on it.
		time.AfterFunc(busRest, func() { c.Close() })
	}
}

func (l *busLink) isBus(c *dbus.Conn) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return c == l.bus
}

// isInit looks for the evidence of sd_booted(3) and at PID 1 itself: the
// directory also exists in containers that only borrow it.
func (l *busLink) isInit(ctx context.Context) error {
	comm, err := l.host.ReadFile(ctx, "/proc/1/comm")
	if err != nil {
		return err
	}
	if string(bytes.TrimSpace(comm)) != "systemd" {
		return ErrNoSystemd
	}
	if _, err := l.host.Lstat(ctx, "/run/systemd/system"); errors.Is(err, fs.ErrNotExist) {
		return ErrNoSystemd
	} else if err != nil {
		return err
	}
	return nil
}

// askSystemd asks systemd something that changes nothing: a bus that gives no
// answer is gone past within the same question.
func askSystemd[T any](ctx context.Context, l *busLink, calls func(context.Context, *dbus.Conn) (T, error)) (answer T, err error) {
	return askVia(ctx, l, l.systemd, os.Geteuid() == 0, calls)
}

// askBus makes calls on a connection and repeats them when it breaks: systemd and
// the bus are restarted by upgrades, and a call that gets no answer closes the
// connection under all others, which are then several in a row while systemd
// reloads.
func askBus[T any](ctx context.Context, l *busLink, connect func(context.Context) (*dbus.Conn, error), calls func(context.Context, *dbus.Conn) (T, error)) (answer T, err error) {
	return askVia(ctx, l, connect, false, calls)
}

// askVia does both: with past, connect finds another way when the bus is silent.
func askVia[T any](ctx context.Context, l *busLink, connect func(context.Context) (*dbus.Conn, error), past bool, calls func(context.Context, *dbus.Conn) (T, error)) (answer T, err error) {
	if _, ok := ctx.Deadline(); !ok {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, defaultLimit)
		defer cancel()
	}
	for try := 0; ; try++ {
		c, err := connect(ctx)
		if err != nil {
			return answer, err
		}
		callCtx, cancel := ctx, context.CancelFunc(func() {})
		if past && l.isBus(c) {
			callCtx, cancel = l.guard(ctx, c)
		}
		// A call writes to the socket before it looks at its context.
		answer, err := bound(callCtx, &l.host.calls, "D-Bus", nil, func() (T, error) { return calls(callCtx, c) })
		silent := callCtx.Err() != nil && ctx.Err() == nil
		cancel()
		switch {
		case err == nil:
			return answer, nil
		case silent:
			c.Close()
			l.fellSilent()
			continue
		case errors.Is(err, context.DeadlineExceeded), errors.Is(err, ErrNoReply):
			// A write may be stuck in it, and whoever comes next would queue
			// behind.
			c.Close()
			return answer, fmt.Errorf("D-Bus: %w", ErrNoReply)
		case errors.Is(err, dbus.ErrClosed) && ctx.Err() == nil && try < 5:
			// Closed under this question by another that had no answer. It is
			// refused a moment before the connection says that it is closed.
			select {
			case <-c.Context().Done():
			case <-ctx.Done():
			}
			continue
		case !c.Connected() && ctx.Err() == nil && try < 5:
			continue
		}
		return answer, err
	}
}

// SystemState implements [View].
func (h *Host) SystemState(ctx context.Context) (string, error) {
	trace(ctx, "systemd SystemState")
	return askSystemd(ctx, &h.bus, func(ctx context.Context, c *dbus.Conn) (state string, err error) {
		err = c.Object(systemdName, systemdPath).CallWithContext(ctx, getProperty, dbus.FlagNoAutoStart, systemdManager, "SystemState").Store(&state)
		return state, err
	})
}

// Units implements [View].
func (h *Host) Units(ctx context.Context, names ...string) ([]Unit, error) {
	if len(names) == 0 {
		return nil, h.bus.isInit(ctx)
	}
	for _, name := range names {
		if !validUnit(name) {
			return nil, fmt.Errorf("%q is no unit name", name)
		}
	}
	trace(ctx, "systemd units "+strings.Join(names, " "))
	units, err := h.units(ctx, "ListUnitsByNames", names)
	if err != nil {
		return nil, err
	}
	if len(units) != len(names) {
		return nil, fmt.Errorf("systemd answered with %d units, asked for %d", len(units), len(names))
	}
	for i := range units {
		units[i].Name = names[i]
	}
	return units, nil
}

// UnitsMatching implements [View].
func (h *Host) UnitsMatching(ctx context.Context, patterns ...string) ([]Unit, error) {
	trace(ctx, "systemd units "+strings.Join(patterns, " "))
	return h.units(ctx, "ListUnitsByPatterns", patterns, []string{}) // in any state
}

// validUnit keeps out what systemd passes over without a word, so that its
// answers stay in the order of the questions (unit_name_is_valid).
func validUnit(name string) bool {
	stem, suffix, ok := cutLast(name, '.')
	if !ok || stem == "" || len(name) > 255 || stem[0] == '@' {
		return false
	}
	switch suffix {
	case "service", "socket", "device", "mount", "automount", "swap", "target", "path", "timer", "slice", "scope":
	default:
		return false
	}
	return strings.Trim(stem, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789:-_.\\@") == "" && !strings.HasSuffix(stem, "@")
}

func cutLast(s string, sep byte) (before, after string, ok bool) {
	i := strings.LastIndexByte(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+1:], true
}

// maxInFlight limits the questions of a batch that wait for an answer at a time.
const maxInFlight = 64

// units lists units by a method of the manager, whose last argument is the names or
// patterns, and fetches the properties the list lacks: the few needed, many in
// flight at a time. GetAll would have PID 1 read the accounting of each cgroup and
// send some 400 values a service. What can not have changed since it was last asked
// is not asked again: the questions were a third of what an idle agent costs, and
// cost PID 1 and the bus as much.
func (h *Host) units(ctx context.Context, method string, names []string, before ...any) ([]Unit, error) {
	memory, what := &h.bus.units, method+" "+strings.Join(names, " ")
	told := false
	if h.bus.silence() == nil { // or each pass would wait for the bus first
		units, ok, all := memory.recallAnswer(ctx, &h.calls, what)
		if ok {
			return units, nil
		}
		told = all
	}
	heard := memory.heardSoFar()
	units, err := askSystemd(ctx, &h.bus, func(ctx context.Context, c *dbus.Conn) ([]Unit, error) {
		manager := c.Object(systemdName, systemdPath)
		var list []systemd.UnitStatus
		err := manager.CallWithContext(ctx, systemdManager+"."+method, dbus.FlagNoAutoStart, append(slices.Clone(before), names)...).Store(&list)
		if err != nil {
			return nil, fmt.Errorf("systemd %s: %w", method, err)
		}
		give, err := h.bus.batch.take(ctx)
		if err != nil {
			return nil, err
		}
		defer give()
		var pending []propertyCall
		collect := func() error {
			for _, p := range pending {
				if err := p.take(ctx); err != nil {
					return err
				}
			}
			pending = pending[:0]
			return nil
		}
		get := func(path dbus.ObjectPath, list ...propertyCall) error {
			for _, p := range list {
				p.call = c.Object(systemdName, path).GoWithContext(ctx, getProperty, dbus.FlagNoAutoStart, nil, p.iface, p.name)
				pending = append(pending, p)
			}
			if len(pending) < maxInFlight {
				return nil
			}
			return collect()
		}
		units, signs, done := make([]Unit, len(list)), make([]unitSign, len(list)), make([]bool, len(list))
		var loaded uint64
		if err := get(systemdPath, propertyCall{iface: systemdManager, name: "UnitsLoadTimestampMonotonic", set: func(v any) { loaded, _ = v.(uint64) }}); err != nil {
			return nil, err
		}
		for i, st := range list {
			u := &units[i]
			*u = Unit{Name: st.Name, ID: st.Name, Load: st.LoadState, Active: st.ActiveState, Sub: st.SubState, Job: st.JobId != 0}
			if u.Load == "not-found" {
				continue
			}
			if done[i] = told && memory.untold(st.Path, u); done[i] {
				continue
			}
			if err := get(st.Path, unitChanges(u, &signs[i])...); err != nil {
				return nil, err
			}
		}
		if err := collect(); err != nil {
			return nil, err
		}
		for i, st := range list {
			u := &units[i]
			signs[i].loaded = loaded
			if u.Load == "not-found" || done[i] || memory.recall(st.Path, signs[i], u) {
				continue
			}
			if err := get(st.Path, unitProperties(u)...); err != nil {
				return nil, err
			}
		}
		if err := collect(); err != nil {
			return nil, err
		}
		for i, st := range list {
			if units[i].Load != "not-found" && !done[i] {
				memory.keep(st.Path, signs[i], units[i], heard)
			}
		}
		return units, nil
	})
	if err == nil {
		memory.keepAnswer(what, names, units, heard)
	}
	return units, err
}

type propertyCall struct {
	iface, name string
	set         func(any)
	call        *dbus.Call
}

func (p propertyCall) take(ctx context.Context) error {
	select {
	case <-p.call.Done:
	case <-ctx.Done():
		return ctx.Err()
	}
	var v dbus.Variant
	err := p.call.Store(&v)
	var derr dbus.Error
	if errors.As(err, &derr) {
		// The unit was unloaded meanwhile, or this systemd is older than the
		// property: what is left out stays zero.
		switch derr.Name {
		case "org.freedesktop.DBus.Error.UnknownObject", "org.freedesktop.DBus.Error.UnknownProperty",
			"org.freedesktop.DBus.Error.UnknownInterface", "org.freedesktop.DBus.Error.UnknownMethod",
			"org.freedesktop.systemd1.NoSuchUnit":
			return nil
		}
	}
	if err != nil {
		return fmt.Errorf("systemd property %s: %w", p.name, err)
	}
	p.set(v.Value())
	return nil
}

// unitChanges are the properties that tell whether others have changed, and the
// one that changes without any sign, by "systemctl enable --no-reload".
func unitChanges(u *Unit, sign *unitSign) []propertyCall {
	sign.load, sign.active, sign.sub = u.Load, u.Active, u.Sub
	return []propertyCall{
		{iface: unitInterface, name: "StateChangeTimestampMonotonic", set: func(v any) { sign.changed, _ = v.(uint64) }},
		{iface: unitInterface, name: "UnitFileState", set: func(v any) { u.FileState, _ = v.(string) }},
	}
}

// unitProperties are the other properties of a kind of unit and where they go.
func unitProperties(u *Unit) []propertyCall {
	text := func(to *string) func(any) {
		return func(v any) { *to, _ = v.(string) }
	}
	moment := func(to *time.Time) func(any) {
		return func(v any) {
			if usec, _ := v.(uint64); usec != 0 && usec < 1<<62 {
				*to = time.UnixMicro(int64(usec))
			}
		}
	}
	whole := func(to *int) func(any) {
		return func(v any) {
			switch n := v.(type) {
			case uint32:
				*to = int(n)
			case int32:
				*to = int(n)
			}
		}
	}
	const iface = systemdName + "."
	props := []propertyCall{
		{iface: iface + "Unit", name: "FragmentPath", set: text(&u.FragmentPath)},
		{iface: iface + "Unit", name: "ActiveEnterTimestamp", set: moment(&u.ActiveSince)},
		{iface: iface + "Unit", name: "ActiveExitTimestamp", set: moment(&u.InactiveSince)},
	}
	switch {
	case strings.HasSuffix(u.ID, ".service"):
		props = append(props,
			propertyCall{iface: iface + "Service", name: "Result", set: text(&u.Result)},
			propertyCall{iface: iface + "Service", name: "MainPID", set: whole(&u.MainPID)},
			propertyCall{iface: iface + "Service", name: "NRestarts", set: whole(&u.NRestarts)},
			propertyCall{iface: iface + "Service", name: "OOMScoreAdjust", set: whole(&u.OOMScoreAdjust)},
			propertyCall{iface: iface + "Service", name: "ControlGroup", set: text(&u.ControlGroup)})
	case strings.HasSuffix(u.ID, ".mount"):
		props = append(props,
			propertyCall{iface: iface + "Mount", name: "What", set: text(&u.What)},
			propertyCall{iface: iface + "Mount", name: "Where", set: text(&u.Where)},
			propertyCall{iface: iface + "Mount", name: "Result", set: text(&u.Result)})
	case strings.HasSuffix(u.ID, ".timer"):
		props = append(props, propertyCall{iface: iface + "Timer", name: "LastTriggerUSec", set: moment(&u.LastTrigger)})
	case strings.HasSuffix(u.ID, ".slice"):
		props = append(props, propertyCall{iface: iface + "Slice", name: "ControlGroup", set: text(&u.ControlGroup)})
	case strings.HasSuffix(u.ID, ".scope"):
		props = append(props, propertyCall{iface: iface + "Scope", name: "ControlGroup", set: text(&u.ControlGroup)})
	}
	return props
}

// BusProperties implements [View].
func (h *Host) BusProperties(ctx context.Context, dest, object, iface string) (props map[string]any, ok bool, err error) {
	trace(ctx, "D-Bus "+dest)
	// A nil map says that nobody owns the name.
	raw, err := askBus(ctx, &h.bus, h.bus.systemBus, func(ctx context.Context, c *dbus.Conn) (raw map[string]dbus.Variant, err error) {
		// A service that starts on demand has no owner until it runs.
		var owned bool
		if err := c.BusObject().CallWithContext(ctx, "org.freedesktop.DBus.NameHasOwner", 0, dest).Store(&owned); err != nil || !owned {
			return nil, err
		}
		err = c.Object(dest, dbus.ObjectPath(object)).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", dbus.FlagNoAutoStart, iface).Store(&raw)
		var derr dbus.Error
		if errors.As(err, &derr) && (derr.Name == "org.freedesktop.DBus.Error.ServiceUnknown" || derr.Name == "org.freedesktop.DBus.Error.NameHasNoOwner") {
			return nil, nil // it went away in between
		}
		return raw, err
	})
	if errors.Is(err, fs.ErrNotExist) { // no bus, nobody on it
		return nil, false, nil
	}
	if err != nil {
		return nil, false, fmt.Errorf("D-Bus %s: %w", dest, err)
	}
	if raw == nil {
		return nil, false, nil
	}
	props = make(map[string]any, len(raw))
	for name, v := range raw {
		props[name] = plain(v.Value())
	}
	return props, true, nil
}

// plain turns a D-Bus value into what encoding/json would make of it.
func plain(v any) any {
	switch v := v.(type) {
	case dbus.Variant:
		return plain(v.Value())
	case dbus.ObjectPath:
		return string(v)
	case dbus.Signature:
		return v.String()
	case string, bool, float64:
		return v
	case dbus.UnixFD: // ours by now, and of no use as data
		unix.Close(int(v))
		return nil
	case byte:
		return float64(v)
	case int16:
		return float64(v)
	case uint16:
		return float64(v)
	case int32:
		return float64(v)
	case uint32:
		return float64(v)
	case int64:
		return float64(v)
	case uint64:
		return float64(v)
	}
	return plainContainer(v)
}

func plainContainer(v any) any {
	rv := reflect.ValueOf(v)
	switch rv.Kind() {
	case reflect.Slice: // arrays and, as []any, structs
		out := make([]any, rv.Len())
		for i := range out {
			out[i] = plain(rv.Index(i).Interface())
		}
		return out
	case reflect.Map:
		out := make(map[string]any, rv.Len())
		for key, value := range rv.Seq2() {
			out[fmt.Sprint(plain(key.Interface()))] = plain(value.Interface())
		}
		return out
	}
	return fmt.Sprint(v)
}
