package host

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

// Job is a command that runs as a transient unit of the host's systemd: in a
// cgroup of its own outside the agent's pod, with the host's journal for its
// output, and for as long as it takes whatever becomes of the agent.
type Job struct {
	// Name is the unit's without ".service". Who starts a job under the name of
	// one that is still there gets [ErrJobExists]: there is one at a time.
	Name        string
	Description string
	// Argv begins with an absolute path of the host.
	Argv []string
	Env  []string
	// Limit ends the job, however far it is (RuntimeMaxSec=).
	Limit time.Duration
}

// JobPrefix begins the names of all of the agent's units.
const JobPrefix = "host-hygiene-"

// ErrJobExists: a job of that name runs, or was not collected.
var ErrJobExists = errors.New("a job of that name exists")

// JobState is what became of a job. It stays with systemd until it is collected,
// so that an agent that comes after the one that started it can learn it.
type JobState struct {
	Name, Description string
	// Found: systemd knows the job.
	Found, Running bool
	// Result is "success", "exit-code", "signal", "timeout", "oom-kill", ...
	// (systemd.exec(5), $SERVICE_RESULT).
	Result string
	// Code is the exit status, or the signal where Result is "signal".
	Code int
	Argv []string
	// Started and Ended are times of the host; zero when not yet.
	Started, Ended time.Time
}

const (
	serviceIface = systemdName + ".Service"
	unitIface    = systemdName + ".Unit"
)

type unitProperty struct {
	Name  string
	Value dbus.Variant
}

type auxUnit struct {
	Name       string
	Properties []unitProperty
}

type execCommand struct {
	Path             string
	Args             []string
	UncleanIsFailure bool
}

// callSystemd makes one call of the manager's that changes something.
func (c *Changer) callSystemd(ctx context.Context, method string, store []any, args ...any) error {
	_, err := askBus(ctx, &c.h.bus, c.h.bus.systemd, func(ctx context.Context, conn *dbus.Conn) (struct{}, error) {
		call := conn.Object(systemdName, systemdPath).CallWithContext(ctx, systemdManager+"."+method, dbus.FlagNoAutoStart, args...)
		return struct{}{}, call.Store(store...)
	})
	if err != nil {
		return fmt.Errorf("systemd %s: %w", method, err)
	}
	return nil
}

// StartJob hands a job to systemd and returns when it has been accepted.
func (c *Changer) StartJob(ctx context.Context, j Job) error {
	if len(j.Argv) == 0 || !strings.HasPrefix(j.Argv[0], "/") || j.Limit <= 0 {
		return fmt.Errorf("job %s has no absolute path or no limit", j.Name)
	}
	if !strings.HasPrefix(j.Name, JobPrefix) {
		return fmt.Errorf("job %q: the name does not begin with %s", j.Name, JobPrefix)
	}
	prop := func(name string, value any) unitProperty { return unitProperty{name, dbus.MakeVariant(value)} }
	props := []unitProperty{
		prop("Description", j.Description),
		// exec, not oneshot: RuntimeMaxSec= has no effect on oneshot, and a
		// program that can not be started is an error at once.
		prop("Type", "exec"),
		prop("ExecStart", []execCommand{{j.Argv[0], j.Argv, false}}),
		prop("Environment", append([]string{}, j.Env...)),
		prop("RuntimeMaxUSec", uint64(j.Limit.Microseconds())),
		// dpkg ends the package it is at when it is asked to.
		prop("TimeoutStopUSec", uint64((2 * time.Minute).Microseconds())),
		// Together with the default CollectMode the unit stays until it is
		// collected, whether it succeeded or failed.
		prop("RemainAfterExit", true),
		prop("StandardInput", "null"),
		prop("StandardOutput", "journal"),
		prop("StandardError", "journal"),
		prop("SyslogIdentifier", j.Name),
		// The last lines of a failure must not fall to the rate limit.
		prop("LogRateLimitIntervalUSec", uint64(0)),
		prop("UMask", uint32(0o022)),
	}
	var queued dbus.ObjectPath
	err := c.callSystemd(ctx, "StartTransientUnit", []any{&queued}, j.Name+".service", "fail", props, []auxUnit{})
	if isBusError(err, "org.freedesktop.systemd1.UnitExists") {
		return fmt.Errorf("%s: %w", j.Name, ErrJobExists)
	}
	return err
}

func isBusError(err error, name string) bool {
	var e dbus.Error
	return errors.As(err, &e) && e.Name == name
}

// Job asks what became of a job; Found is false when there is none.
func (c *Changer) Job(ctx context.Context, name string) (JobState, error) {
	return askSystemd(ctx, &c.h.bus, func(ctx context.Context, conn *dbus.Conn) (JobState, error) {
		var list []systemd.UnitStatus
		err := conn.Object(systemdName, systemdPath).CallWithContext(ctx, systemdManager+".ListUnitsByNames", dbus.FlagNoAutoStart, []string{name + ".service"}).Store(&list)
		if err != nil || len(list) != 1 {
			return JobState{Name: name}, err
		}
		return readJob(ctx, conn, list[0])
	})
}

// Jobs lists the agent's jobs that systemd still knows.
func (c *Changer) Jobs(ctx context.Context) ([]JobState, error) {
	return askSystemd(ctx, &c.h.bus, func(ctx context.Context, conn *dbus.Conn) ([]JobState, error) {
		var list []systemd.UnitStatus
		err := conn.Object(systemdName, systemdPath).CallWithContext(ctx, systemdManager+".ListUnitsByPatterns", dbus.FlagNoAutoStart, []string{}, []string{JobPrefix + "*.service"}).Store(&list)
		if err != nil {
			return nil, err
		}
		var jobs []JobState
		for _, st := range list {
			j, err := readJob(ctx, conn, st)
			if err != nil {
				return nil, err
			}
			if j.Found {
				jobs = append(jobs, j)
			}
		}
		return jobs, nil
	})
}

func readJob(ctx context.Context, conn *dbus.Conn, st systemd.UnitStatus) (JobState, error) {
	j := JobState{Name: strings.TrimSuffix(st.Name, ".service"), Description: st.Description}
	if st.LoadState != "loaded" {
		return j, nil
	}
	var props map[string]dbus.Variant
	err := conn.Object(systemdName, st.Path).CallWithContext(ctx, "org.freedesktop.DBus.Properties.GetAll", dbus.FlagNoAutoStart, serviceIface).Store(&props)
	if isBusError(err, "org.freedesktop.DBus.Error.UnknownObject") || isBusError(err, "org.freedesktop.systemd1.NoSuchUnit") {
		return j, nil
	}
	if err != nil {
		return j, err
	}
	j.Found = true
	switch st.ActiveState {
	case "active":
		j.Running = st.SubState != "exited"
	case "activating", "deactivating", "reloading":
		j.Running = true
	case "inactive":
		// Accepted and not begun.
		j.Running = st.JobId != 0
	}
	j.Result, _ = props["Result"].Value().(string)
	if n, ok := props["ExecMainStatus"].Value().(int32); ok {
		j.Code = int(n)
	}
	at := func(name string) time.Time {
		if usec, _ := props[name].Value().(uint64); usec != 0 {
			return time.UnixMicro(int64(usec))
		}
		return time.Time{}
	}
	j.Started, j.Ended = at("ExecMainStartTimestamp"), at("ExecMainExitTimestamp")
	// ExecStart is a(sasbttttuii); the second of the first is the argv.
	if execs, ok := props["ExecStart"].Value().([][]any); ok && len(execs) > 0 && len(execs[0]) > 1 {
		j.Argv, _ = execs[0][1].([]string)
	}
	return j, nil
}

// CollectJob has systemd forget a job that has ended. One that runs is stopped.
func (c *Changer) CollectJob(ctx context.Context, name string) error {
	unit := name + ".service"
	var queued dbus.ObjectPath
	err := c.callSystemd(ctx, "StopUnit", []any{&queued}, unit, "replace")
	if isBusError(err, "org.freedesktop.systemd1.NoSuchUnit") {
		return nil
	}
	if err != nil {
		return err
	}
	err = c.callSystemd(ctx, "ResetFailedUnit", nil, unit)
	if isBusError(err, "org.freedesktop.systemd1.NoSuchUnit") {
		return nil
	}
	return err
}

// EnableUnit has a unit started at boot.
func (c *Changer) EnableUnit(ctx context.Context, name string) error {
	return c.unitFiles(ctx, "EnableUnitFiles", name, false, false)
}

// DisableUnit undoes EnableUnit.
func (c *Changer) DisableUnit(ctx context.Context, name string) error {
	return c.unitFiles(ctx, "DisableUnitFiles", name, false)
}

// UnmaskUnit removes the link to /dev/null that forbids a unit.
func (c *Changer) UnmaskUnit(ctx context.Context, name string) error {
	return c.unitFiles(ctx, "UnmaskUnitFiles", name, false)
}

// MaskUnit undoes UnmaskUnit.
func (c *Changer) MaskUnit(ctx context.Context, name string) error {
	return c.unitFiles(ctx, "MaskUnitFiles", name, false, true)
}

// unitFiles changes what the unit's files say and has systemd read them anew, as
// systemctl does.
func (c *Changer) unitFiles(ctx context.Context, method, name string, flags ...any) error {
	if !validUnit(name) {
		return fmt.Errorf("%q is no unit name", name)
	}
	type change struct{ Type, File, Destination string }
	var changes []change
	store := []any{&changes}
	installable := true
	if method == "EnableUnitFiles" {
		store = []any{&installable, &changes}
	}
	if err := c.callSystemd(ctx, method, store, append([]any{[]string{name}}, flags...)...); err != nil {
		return err
	}
	if !installable && len(changes) == 0 {
		return fmt.Errorf("%s can not be enabled: its unit file has no [Install] section, so something else starts it", name)
	}
	return c.ReloadSystemd(ctx)
}

// ReloadSystemd is systemctl daemon-reload.
func (c *Changer) ReloadSystemd(ctx context.Context) error {
	return c.callSystemd(ctx, "Reload", nil)
}

// StartUnit starts a unit and waits until it has been, or has failed to be.
func (c *Changer) StartUnit(ctx context.Context, name string) error {
	return c.unitJob(ctx, "StartUnit", name)
}

// StopUnit undoes StartUnit.
func (c *Changer) StopUnit(ctx context.Context, name string) error {
	return c.unitJob(ctx, "StopUnit", name)
}

// ReloadUnit has a unit read its configuration anew without a restart.
func (c *Changer) ReloadUnit(ctx context.Context, name string) error {
	return c.unitJob(ctx, "ReloadUnit", name)
}

func (c *Changer) unitJob(ctx context.Context, method, name string) error {
	if !validUnit(name) {
		return fmt.Errorf("%q is no unit name", name)
	}
	var queued dbus.ObjectPath
	// "fail", so that nobody else's queued job is thrown away for ours.
	if err := c.callSystemd(ctx, method, []any{&queued}, name, "fail"); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	for {
		units, err := c.h.Units(ctx, name)
		if err != nil {
			return err
		}
		u := units[0]
		if !u.Job {
			return judgeUnitJob(method, u)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%s is still %s (%s): %w", name, u.Active, u.Sub, ErrNoReply)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

func judgeUnitJob(method string, u Unit) error {
	switch {
	case method == "StartUnit" && u.Active == "failed", method == "ReloadUnit" && !u.Running():
		return fmt.Errorf("%s is %s (%s), result %s", u.Name, u.Active, u.Sub, u.Result)
	case method == "StopUnit" && u.Active != "inactive" && u.Active != "failed":
		return fmt.Errorf("%s is still %s (%s)", u.Name, u.Active, u.Sub)
	}
	return nil
}
