package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// UnitFiles is what [Host.FollowUnits] calls a change of what systemd knows
// besides the state of units: it was reloaded, units were enabled or disabled,
// the start of the host has finished.
const UnitFiles = "unit files"

// FollowUnits tells when one of the named units has changed, by the name as
// given, and of UnitFiles. While systemd works on a unit nothing is told of it:
// a probe judges no unit with a job, and the end of the job is told.
//
// Only the named units are subscribed to: the bus filters, and the scopes of
// pods that come and go wake nobody. Without a bus systemd's own socket is used,
// which sends everything.
func (h *Host) FollowUnits(ctx context.Context, names []string, l Listener) error {
	if err := h.bus.isInit(ctx); err != nil {
		return err
	}
	for _, name := range names {
		if !validUnit(name) {
			return fmt.Errorf("%q is no unit name", name)
		}
	}
	memory := &h.bus.units
	s := &unitSignals{poke: make(chan struct{}, 1), told: memory.told}
	c, bus, err := h.signalConn(ctx, s)
	if err != nil {
		return err
	}
	defer c.Close()
	defer memory.deaf(c)
	subscribe := func() error {
		ctx, cancel := context.WithTimeout(ctx, defaultLimit)
		defer cancel()
		memory.deaf(c)
		if err := s.subscribe(ctx, c, bus, names); err != nil {
			return err
		}
		memory.listening(c, s.names)
		return nil
	}
	if err := subscribe(); err != nil {
		return err
	}
	l.Listening()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-c.Context().Done():
			return fmt.Errorf("the connection to systemd: %w", errEnded)
		case <-s.poke:
		}
		changed, files, newOwner := s.take()
		if files || newOwner {
			// A name may be another unit's alias now; and a systemd that came
			// back on the bus knows no subscribers.
			if err := subscribe(); err != nil {
				return err
			}
		}
		for _, name := range names {
			if newOwner || slices.Contains(changed, name) {
				l.Happened(name)
			}
		}
		if files || newOwner {
			l.Happened(UnitFiles)
		}
		if len(changed) > 0 || files || newOwner {
			if err := pause(ctx); err != nil {
				return err
			}
		}
	}
}

// signalConn is a connection of its own: what comes in on the one for questions
// would hold those up.
func (h *Host) signalConn(ctx context.Context, s *unitSignals) (c *dbus.Conn, bus bool, err error) {
	dialCtx, cancel := context.WithTimeout(ctx, defaultLimit)
	defer cancel()
	// The one for questions knows whether there is a bus.
	if _, err = h.bus.systemBus(dialCtx); err == nil {
		if c, err = h.bus.open(dialCtx, busSocket, true, s); err == nil {
			return c, true, nil
		}
	}
	if os.Geteuid() != 0 {
		return nil, false, err
	}
	c, perr := h.bus.open(dialCtx, privateSocket, false, s)
	if perr != nil {
		return nil, false, fmt.Errorf("systemd can not be asked for signals: %w", errors.Join(err, perr))
	}
	return c, false, nil
}

// unitSignals takes signals from the connection's reader and keeps what they are
// about, which is all that matters of them.
type unitSignals struct {
	poke chan struct{}
	// told is called at each, whether it may last or not, with the unit's path
	// when it is about one.
	told func(dbus.ObjectPath)

	mu sync.Mutex
	// owner is who systemd is on the bus; empty on its own socket.
	owner    string
	names    map[dbus.ObjectPath][]string
	changed  []string
	files    bool
	newOwner bool
}

var _ dbus.SignalHandler = (*unitSignals)(nil)

const (
	unitInterface = systemdName + ".Unit"
	busName       = "org.freedesktop.DBus"
)

// subscribe asks for the signals of the units by their object paths.
func (s *unitSignals) subscribe(ctx context.Context, c *dbus.Conn, bus bool, names []string) error {
	manager := c.Object(systemdName, systemdPath)
	s.mu.Lock()
	known := s.names
	s.mu.Unlock()
	if bus && known == nil {
		for _, rule := range []string{
			"type='signal',sender='" + systemdName + "',path='" + systemdPath + "',interface='" + systemdManager + "',member='Reloading'",
			"type='signal',sender='" + systemdName + "',path='" + systemdPath + "',interface='" + systemdManager + "',member='UnitFilesChanged'",
			"type='signal',sender='" + systemdName + "',path='" + systemdPath + "',interface='" + systemdManager + "',member='StartupFinished'",
			"type='signal',sender='" + busName + "',interface='" + busName + "',member='NameOwnerChanged',arg0='" + systemdName + "'",
		} {
			if err := addMatch(ctx, c, rule); err != nil {
				return err
			}
		}
	}
	if bus {
		// A new owner is told, and then asked for again.
		var owner string
		if err := c.BusObject().CallWithContext(ctx, busName+".GetNameOwner", 0, systemdName).Store(&owner); err != nil {
			return fmt.Errorf("D-Bus GetNameOwner: %w", err)
		}
		s.mu.Lock()
		s.owner = owner
		s.mu.Unlock()
	}
	if err := manager.CallWithContext(ctx, systemdManager+".Subscribe", dbus.FlagNoAutoStart).Err; err != nil && !isBusError(err, systemdName+".AlreadySubscribed") {
		return fmt.Errorf("systemd Subscribe: %w", err)
	}
	// Signals come from the unit's own path, whatever alias it is asked by. A
	// unit that does not exist has a path already.
	var list []systemd.UnitStatus
	if len(names) > 0 {
		if err := manager.CallWithContext(ctx, systemdManager+".ListUnitsByNames", dbus.FlagNoAutoStart, names).Store(&list); err != nil {
			return fmt.Errorf("systemd ListUnitsByNames: %w", err)
		}
		if len(list) != len(names) {
			return fmt.Errorf("systemd answered with %d units, asked for %d", len(list), len(names))
		}
	}
	paths := map[dbus.ObjectPath][]string{}
	for i, u := range list {
		paths[u.Path] = append(paths[u.Path], names[i])
		if bus && len(paths[u.Path]) == 1 && known[u.Path] == nil {
			if err := addMatch(ctx, c, "type='signal',sender='"+systemdName+"',path='"+string(u.Path)+"',interface='org.freedesktop.DBus.Properties',member='PropertiesChanged',arg0='"+unitInterface+"'"); err != nil {
				return err
			}
		}
	}
	s.mu.Lock()
	s.names = paths
	s.mu.Unlock()
	return nil
}

func addMatch(ctx context.Context, c *dbus.Conn, rule string) error {
	if err := c.BusObject().CallWithContext(ctx, busName+".AddMatch", 0, rule).Err; err != nil {
		return fmt.Errorf("D-Bus AddMatch: %w", err)
	}
	return nil
}

// DeliverSignal implements [dbus.SignalHandler], on the connection's reader.
// Everybody on the bus may send signals; the sender is the bus's word.
func (s *unitSignals) DeliverSignal(_, _ string, sig *dbus.Signal) {
	s.mu.Lock()
	defer s.mu.Unlock()
	from := s.owner
	if sig.Name == busName+".NameOwnerChanged" && from != "" {
		from = busName
	}
	if from != "" && sig.Sender != from {
		return
	}
	switch sig.Name {
	case "org.freedesktop.DBus.Properties.PropertiesChanged":
		names := s.names[sig.Path]
		if len(names) == 0 {
			return
		}
		s.told(sig.Path)
		if !unitSettled(sig.Body) {
			return
		}
		for _, name := range names {
			if !slices.Contains(s.changed, name) {
				s.changed = append(s.changed, name)
			}
		}
	case systemdManager + ".Reloading":
		s.told("")
		if len(sig.Body) == 1 && sig.Body[0] == true {
			return // it will say when it has
		}
		s.files = true
	case systemdManager + ".UnitFilesChanged", systemdManager + ".StartupFinished":
		s.told("")
		s.files = true
	case busName + ".NameOwnerChanged":
		if len(sig.Body) != 3 || sig.Body[0] != systemdName || sig.Body[2] == "" {
			return
		}
		s.told("")
		s.newOwner = true
	default:
		return
	}
	select {
	case s.poke <- struct{}{}:
	default:
	}
}

func (s *unitSignals) take() (changed []string, files, newOwner bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed, files, newOwner = s.changed, s.files, s.newOwner
	s.changed, s.files, s.newOwner = nil, false, false
	return changed, files, newOwner
}

// unitSettled reports whether a PropertiesChanged of the Unit interface tells of
// a state that may last: with a job, and on the way down, another one follows.
func unitSettled(body []any) bool {
	if len(body) < 2 || body[0] != unitInterface {
		return false
	}
	props, ok := body[1].(map[string]dbus.Variant)
	if !ok {
		return false
	}
	if active, _ := props["ActiveState"].Value().(string); active == "deactivating" {
		return false
	}
	if job, ok := props["Job"].Value().([]any); ok && len(job) == 2 {
		if id, _ := job[0].(uint32); id != 0 {
			return false
		}
	}
	return true
}
