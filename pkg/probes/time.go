package probes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Time checks that the clock is right and is being kept right.
//
// The kernel's own word (adjtimex(2)) is only one witness: it stays good for
// almost nine hours after the last daemon has gone, and turns bad for a second
// whenever chronyd restarts. So the daemon is asked too, and the hypervisor's
// clock where there is one.
type Time struct {
	Common
	// MaxOffset from true time before a warning.
	MaxOffset Duration `json:"maxOffset"`
	// CriticalOffset from true time.
	CriticalOffset Duration `json:"criticalOffset"`
	// MaxErrorBound is how far off the clock may be at worst, by the daemon's
	// own estimate.
	MaxErrorBound Duration `json:"maxErrorBound"`
	// HypervisorClock compares with the hypervisor's clock where there is one.
	// An agent that may not open it (docs/observe.md) says so, and the probe is
	// Unknown for it; off, that clock is nobody's concern.
	HypervisorClock bool `json:"hypervisorClock"`
}

// DefaultTime returns the default settings. 50 ms is what Ceph monitors and
// node_exporter's NodeClockSkewDetected tolerate; above 1 s etcd complains.
func DefaultTime() Time {
	return Time{
		MaxOffset:       Duration(50 * time.Millisecond),
		CriticalOffset:  Duration(time.Second),
		MaxErrorBound:   Duration(500 * time.Millisecond),
		HypervisorClock: true,
	}
}

// Name implements [Probe].
func (Time) Name() string { return "time" }

// Condition implements [Probe].
func (Time) Condition() string { return ConditionPrefix + "TimeProblem" }

// Wakes implements [Probe].
func (Time) Wakes(Require) Wakes {
	w := Wakes{Clock: true, Subsystems: []string{"ptp"}}
	for _, d := range timeDaemons {
		w.Units = append(w.Units, d.units...)
		w.Processes = append(w.Processes, d.comm)
	}
	return w
}

// Validate implements [Probe].
func (p Time) Validate() error {
	errs := []error{
		positive("maxOffset", p.MaxOffset),
		positive("criticalOffset", p.CriticalOffset),
		positive("maxErrorBound", p.MaxErrorBound),
	}
	if p.CriticalOffset < p.MaxOffset {
		errs = append(errs, fieldErr("criticalOffset", "%s is below maxOffset %s: want at least that", p.CriticalOffset, p.MaxOffset))
	}
	return errors.Join(errs...)
}

const (
	clockUnsynchronized      = "ClockUnsynchronized"
	clockOffsetHigh          = "ClockOffsetHigh"
	clockErrorBoundHigh      = "ClockErrorBoundHigh"
	noTimeDaemon             = "NoTimeDaemon"
	timeDaemonConflict       = "TimeDaemonConflict"
	timeSourceUnreachable    = "TimeSourceUnreachable"
	timeDaemonLocalReference = "TimeDaemonLocalReference"
	clockDisagrees           = "ClockDisagreesWithHypervisor"
	timeDaemonUnresponsive   = "TimeDaemonUnresponsive"
)

// Rules implements [Probe].
func (Time) Rules() []finding.Rule {
	return []finding.Rule{
		{Reason: clockUnsynchronized, Severity: finding.Critical, HoldBefore: daemonStart,
			HoldWhy: "chronyd marks the clock unsynchronised for a second or two whenever it starts; told at once of a daemon that has run for longer",
			Means:   "Neither the kernel nor a time daemon vouches for the clock.",
			Do:      "See whether the time daemon runs and reaches a server: chronyc sources, timedatectl timesync-status."},
		{Reason: clockOffsetHigh, Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
			HoldBefore: daemonStart, HoldWhy: "a daemon that has just started needs a moment to step the clock; told at once of one that has run for longer",
			Means: "The clock is further from true time than etcd, Ceph and token checks tolerate.",
			Do:    "Let the daemon correct it (chronyc makestep), then find out what moved it: a resumed machine, a bad source, a second daemon."},
		{Reason: clockErrorBoundHigh, Severity: finding.Warning, HoldBefore: time.Minute,
			HoldWhy: "the estimate is wide until a few measurements are in",
			Means:   "The clock may be further off than allowed: nobody has measured it well or recently.",
			Do:      "Look for lost packets or a distant server: chronyc tracking, chronyc sourcestats."},
		{Reason: noTimeDaemon, Severity: finding.Warning,
			Means: "No time daemon runs, so the clock drifts from now on.",
			Do:    "Start or install one: systemctl enable --now chronyd (chrony on Debian and Ubuntu) or systemd-timesyncd."},
		{Reason: timeDaemonConflict, Severity: finding.Warning, HoldBefore: 30 * time.Second,
			HoldWhy: "a package manager that replaces one daemon by another runs both for a moment",
			Means:   "Several daemons steer the same clock and work against each other.",
			Do:      "Keep one and disable the others; a container that only serves time runs chronyd -x."},
		{Reason: timeSourceUnreachable, Severity: finding.Warning, HoldBefore: 2 * time.Minute,
			HoldWhy: "a server's restart or a changed route costs a few polls and does no harm",
			Means:   "The daemon runs, but no time source answers it; the clock drifts.",
			Do:      "Check the servers it is configured with and UDP port 123 on the way to them."},
		{Reason: timeDaemonLocalReference, Severity: finding.Warning, HoldBefore: time.Minute,
			HoldWhy: "a `local` directive steps in while the real sources are first polled",
			Means:   "chronyd follows this machine's own clock and calls that synchronised.",
			Do:      "Restore its sources, or drop the `local` directive where it is not meant."},
		{Reason: clockDisagrees, Severity: finding.Warning, HoldBefore: 15 * time.Second,
			HoldWhy: "a resumed machine is corrected within seconds",
			Means:   "The hypervisor's clock tells another time than this machine.",
			Do:      "Trust neither blindly: compare with a third clock. On a wrong guest, chronyc makestep."},
		{Reason: timeDaemonUnresponsive, Severity: finding.Warning, HoldBefore: 15 * time.Second,
			HoldWhy: "a daemon that is starting or swapped out answers late",
			Means:   "The time daemon's process exists but does not answer.",
			Do:      "Look at its log and restart it."},
	}
}

// timeDaemons are the daemons that steer the system clock, by the comm of
// their process (at most 15 bytes), with the units that may run them.
// ptp4l is not among them: it steers a network card's clock.
var timeDaemons = []struct {
	comm, name string
	units      []string
}{
	{"chronyd", "chronyd", []string{"chronyd.service", "chrony.service"}},
	{"systemd-timesyn", "systemd-timesyncd", []string{"systemd-timesyncd.service"}},
	{"ntpd", "ntpd", []string{"ntpd.service", "ntp.service", "ntpsec.service", "openntpd.service"}},
	{"ntp-daemon", "ntpd-rs", []string{"ntpd-rs.service"}},
	{"phc2sys", "phc2sys", []string{"phc2sys.service"}},
}

// ntpPhaseLimit is NTP_PHASE_LIMIT of kernel/time/ntp.c: the kernel adds 500 µs
// to maxerror every second and gives up at 16 s. That, and not STA_UNSYNC, is
// systemd's rule too: chronyd without rtcsync leaves the flag set for ever.
const ntpPhaseLimit = 16 * time.Second

// Check implements [Probe].
func (p Time) Check(ctx context.Context, in Input) (finding.Result, error) {
	var r finding.Result
	tx, err := in.Host.Adjtimex(ctx)
	if err != nil {
		return r, fmt.Errorf("reading the kernel clock: %w", err)
	}
	c := clockCheck{Time: p, in: in, kernel: tx, r: &r}
	daemons, err := runningTimeDaemons(ctx, in.Host)
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("looking for time daemons: %w", err))
	}
	c.conflict(daemons)
	c.daemons = daemons
	switch {
	case has(daemons, "chronyd"):
		c.chronyd(ctx)
	case has(daemons, "systemd-timesyncd"):
		c.works()
		c.timesyncd(ctx)
	case len(daemons) > 0:
		c.works()
		c.kernelOnly(daemons[0].name)
	case err == nil:
		c.noDaemon(ctx)
	}
	c.hypervisor(ctx)
	return r, errors.Join(c.errs...)
}

// clockCheck is the state of one pass.
type clockCheck struct {
	Time
	in      Input
	kernel  host.Timex
	r       *finding.Result
	errs    []error
	daemons []timeDaemon
	// warm: the daemon has worked for longer than its start may take.
	warm bool
}

// daemonStart is how long a time daemon that was just started may need for its
// first measurement and a step of the clock.
const daemonStart = 15 * time.Second

// works notes that the daemon is at work in this pass. One that was stopped, and
// goes on, is at its start again: what it measured before is too old for it.
func (c *clockCheck) works() {
	for _, d := range c.daemons {
		first := c.in.Memory.Since(fmt.Sprintf("daemon %d %d", d.pid, d.started), c.in.Now)
		c.warm = c.warm || len(c.daemons) == 1 && c.in.Now.Sub(first) >= daemonStart
	}
}

func (c *clockCheck) kernelSynchronised() bool { return c.kernel.MaxError < ntpPhaseLimit }

func (c *clockCheck) kernelEvidence() finding.Evidence {
	return finding.Evidence{
		Source:   "kernel clock, adjtimex(2)",
		Observed: fmt.Sprintf("maximum error %s, state %d, status %#x", short(c.kernel.MaxError), c.kernel.State, c.kernel.Status),
		Expected: "maximum error below 16s",
	}
}

func (c *clockCheck) conflict(daemons []timeDaemon) {
	if len(daemons) < 2 {
		return
	}
	var names []string
	f := finding.Finding{Reason: timeDaemonConflict, Severity: finding.Warning}
	for _, d := range daemons {
		names = append(names, d.name)
		f.Evidence = append(f.Evidence, finding.Evidence{
			Source:   fmt.Sprintf("/proc/%d", d.pid),
			Observed: fmt.Sprintf("%s runs in %s and may set the clock", d.name, d.cgroup),
			Expected: "one time daemon",
		})
	}
	slices.Sort(names)
	f.Subject = strings.Join(slices.Compact(slices.Clone(names)), ",")
	f.Message = fmt.Sprintf("%d time daemons steer the clock at once: %s", len(daemons), strings.Join(names, ", "))
	c.r.Add(f)
}

func (c *clockCheck) chronyd(ctx context.Context) {
	s, err := askChrony(ctx, c.in.Host)
	switch {
	case errors.Is(err, errChronyClosed):
		c.works()
		c.kernelOnly("chronyd (command port closed)")
		if errors.Is(err, fs.ErrPermission) {
			c.errs = append(c.errs, fmt.Errorf("what chronyd knows of its sources: %w", err))
		}
		return
	case errors.Is(err, host.ErrNoReply):
		c.r.Add(finding.Finding{
			Reason: timeDaemonUnresponsive, Severity: finding.Warning, Subject: "chronyd",
			Message: "chronyd runs but does not answer on its command port",
			Evidence: []finding.Evidence{
				{Source: "chronyd, " + chronyUDP, Observed: "no reply within 2s", Expected: "a reply"},
				c.kernelEvidence(),
			},
		})
		c.kernelNumbers()
		return
	case err != nil:
		c.errs = append(c.errs, fmt.Errorf("asking chronyd: %w", err))
		c.kernelNumbers()
		return
	}
	c.works()
	t := s.tracking
	tracking := "chronyd tracking, " + s.via
	sources := "chronyd sources, " + s.via

	if t.leap == leapUnsynchronised || !c.kernelSynchronised() {
		observed := fmt.Sprintf("leap status %d, stratum %d", t.leap, t.stratum)
		if t.leap == leapUnsynchronised {
			observed = "not synchronised"
		}
		c.unsynchronised("chronyd", "chronyd has not synchronised the clock",
			finding.Evidence{Source: tracking, Observed: observed, Expected: "synchronised"})
	} else {
		c.offset("chronyd", tracking, t.offset, t.bound(), c.MaxErrorBound)
	}
	if t.refID == refLocal && t.leap != leapUnsynchronised {
		c.r.Add(finding.Finding{
			Reason: timeDaemonLocalReference, Severity: finding.Warning, Subject: "chronyd",
			Message: "chronyd follows this machine's own clock: no real time source is selected",
			Evidence: []finding.Evidence{{Source: tracking,
				Observed: fmt.Sprintf("reference 127.127.1.1 (local), stratum %d", t.stratum), Expected: "a time source"}},
		})
	}
	c.chronySources(sources, s.sources)

	switch {
	case t.leap == leapUnsynchronised:
		c.r.Summary = "chronyd runs, the clock is not synchronised"
	case t.address.IsValid():
		c.r.Summary = fmt.Sprintf("chronyd follows %s (stratum %d), offset %s, error at most %s",
			t.address, t.stratum, short(t.offset), short(t.bound()))
	default:
		c.r.Summary = fmt.Sprintf("chronyd follows %s (stratum %d), offset %s, error at most %s",
			refName(t.refID), t.stratum, short(t.offset), short(t.bound()))
	}
}

// chronySources judges reachability. Tracking does not show it: for hours after
// the last reply it goes on naming the same server and the same offset.
func (c *clockCheck) chronySources(where string, sources []chronySource) {
	f := finding.Finding{Reason: timeSourceUnreachable, Severity: finding.Warning, Subject: "chronyd"}
	if len(sources) == 0 {
		f.Message = "chronyd has no time source configured"
		f.Evidence = []finding.Evidence{{Source: where, Observed: "0 sources", Expected: "at least 1"}}
		c.r.Add(f)
		return
	}
	answering := 0
	for _, s := range sources {
		if s.answered() && s.usable() {
			return
		}
		if s.answered() {
			answering++
		}
		last := "no reply yet"
		if !s.never {
			last = "last reply " + short(s.since) + " ago"
		}
		name := "a reference clock"
		if s.address.IsValid() {
			name = s.address.String()
		}
		if len(f.Evidence) < 8 {
			f.Evidence = append(f.Evidence, finding.Evidence{
				Source:   where,
				Observed: fmt.Sprintf("%s: reach %04o, %s, %s", name, s.reach, s.stateName(), last),
				Expected: "a reply to one of the last 3 polls",
			})
		}
	}
	if answering > 0 {
		f.Message = fmt.Sprintf("chronyd rejects every time source that answers (%d of %d)", answering, len(sources))
	} else {
		f.Message = fmt.Sprintf("no time source answers chronyd (%d configured); the clock drifts", len(sources))
	}
	c.r.Add(f)
}

func (c *clockCheck) timesyncd(ctx context.Context) {
	const dest, object, iface = "org.freedesktop.timesync1", "/org/freedesktop/timesync1", "org.freedesktop.timesync1.Manager"
	props, ok, err := c.in.Host.BusProperties(ctx, dest, object, iface)
	switch {
	case errors.Is(err, host.ErrNoReply):
		c.r.Add(finding.Finding{
			Reason: timeDaemonUnresponsive, Severity: finding.Warning, Subject: "systemd-timesyncd",
			Message:  "systemd-timesyncd runs but does not answer on the system bus",
			Evidence: []finding.Evidence{{Source: "D-Bus " + dest, Observed: "no reply", Expected: "a reply"}, c.kernelEvidence()},
		})
		c.kernelNumbers()
		return
	case err != nil:
		c.errs = append(c.errs, fmt.Errorf("asking systemd-timesyncd: %w", err))
		c.kernelNumbers()
		return
	case !ok: // started a moment ago, or the bus is down
		c.kernelOnly("systemd-timesyncd (not on the bus)")
		return
	}
	m, err := parseNTPMessage(props["NTPMessage"])
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("asking systemd-timesyncd: %w", err))
		c.kernelNumbers()
		return
	}
	server, _ := props["ServerName"].(string)
	server = cmp.Or(server, "its server")
	const source = "D-Bus " + dest
	unreachable := finding.Finding{Reason: timeSourceUnreachable, Severity: finding.Warning, Subject: "systemd-timesyncd"}
	if m.packets == 0 {
		unreachable.Message = fmt.Sprintf("systemd-timesyncd has never had an answer from %s", server)
		unreachable.Evidence = []finding.Evidence{{Source: source, Observed: "PacketCount 0", Expected: "at least 1"}, c.kernelEvidence()}
		c.r.Add(unreachable)
		if !c.kernelSynchronised() {
			c.unsynchronised("systemd-timesyncd", "systemd-timesyncd has not synchronised the clock",
				finding.Evidence{Source: source, Observed: "PacketCount 0", Expected: "at least 1"})
		}
		c.kernelNumbers()
		c.r.Summary = "systemd-timesyncd runs and has no answer yet"
		return
	}
	if !c.kernelSynchronised() {
		c.unsynchronised("systemd-timesyncd", "systemd-timesyncd has not synchronised the clock",
			finding.Evidence{Source: source, Observed: fmt.Sprintf("PacketCount %d", m.packets)})
	}
	// timesyncd sets maxerror to 0 at every update and the kernel adds 500 µs a
	// second, so maxerror is a clock of its own: the age of the last update.
	age := c.kernel.MaxError / (500 * time.Microsecond) * time.Second
	poll := 2048 * time.Second
	if us, ok := props["PollIntervalMaxUSec"].(float64); ok && us > 0 {
		poll = time.Duration(us) * time.Microsecond
	}
	if age > 3*poll {
		unreachable.Message = fmt.Sprintf("systemd-timesyncd has not heard from %s for three polls; the clock drifts", server)
		unreachable.Evidence = []finding.Evidence{{Source: "kernel clock, adjtimex(2)",
			Observed: "last update " + short(age) + " ago", Expected: "within " + short(3*poll)}}
		c.r.Add(unreachable)
	}
	// maxerror is left out: at the longest poll it reaches a second while all is
	// well, for the kernel assumes a drift of 500 ppm.
	bound := m.offset.Abs() + m.rootDelay/2 + m.rootDispersion
	c.offset("systemd-timesyncd", source, m.offset, bound, c.MaxErrorBound)
	c.r.Summary = fmt.Sprintf("systemd-timesyncd follows %s (stratum %d), offset %s, error at most %s",
		server, m.stratum, short(m.offset), short(bound))
}

// kernelOnly judges a daemon whose own word is not to be had by what it leaves
// in the kernel.
func (c *clockCheck) kernelOnly(daemon string) {
	if !c.kernelSynchronised() {
		c.unsynchronised(daemon, daemon+" has not synchronised the clock")
		c.kernelNumbers()
		return
	}
	offset := c.kernel.Offset
	// On top of the limit, what the kernel adds between two polls of 2,048 s.
	limit := c.MaxErrorBound + Duration(2048*500*time.Microsecond)
	c.offset(daemon, "kernel clock, adjtimex(2)", offset, c.kernel.MaxError+offset.Abs(), limit)
	c.r.Summary = fmt.Sprintf("%s runs; by the kernel's account the error is at most %s", daemon, short(c.kernel.MaxError+offset.Abs()))
}

func (c *clockCheck) noDaemon(ctx context.Context) {
	c.r.Summary = "no time daemon"
	c.kernelNumbers()
	changing, err := timeUnitChanging(ctx, c.in.Host)
	if err != nil {
		c.errs = append(c.errs, fmt.Errorf("asking systemd about time daemons: %w", err))
	}
	if changing != "" {
		c.r.Summary = changing + " is being started or stopped"
		return
	}
	f := finding.Finding{
		Reason: noTimeDaemon, Severity: finding.Warning,
		Message: "no time daemon runs; the clock drifts from now on",
		Evidence: []finding.Evidence{
			{Source: "/proc", Observed: "no chronyd, systemd-timesyncd, ntpd, ntpd-rs or phc2sys", Expected: "one of them"},
			c.kernelEvidence(),
		},
	}
	c.r.Add(f)
	if !c.kernelSynchronised() {
		c.unsynchronised("", "the clock is not synchronised and no daemon is there to do it")
	}
}

func (c *clockCheck) unsynchronised(daemon, message string, more ...finding.Evidence) {
	c.r.Add(finding.Finding{
		Reason: clockUnsynchronized, Severity: finding.Critical, Subject: daemon, Message: message,
		Evidence: append(more, c.kernelEvidence()), Settled: c.warm,
	})
}

// kernelNumbers publishes what is known when no daemon tells better.
func (c *clockCheck) kernelNumbers() {
	c.r.Sample("hosthygiene_time_offset_seconds", c.kernel.Offset.Seconds())
	c.r.Sample("hosthygiene_time_error_bound_seconds", c.kernel.MaxError.Seconds())
}

func (c *clockCheck) offset(daemon, source string, offset, bound time.Duration, maxBound Duration) {
	c.r.Sample("hosthygiene_time_offset_seconds", offset.Seconds())
	c.r.Sample("hosthygiene_time_error_bound_seconds", bound.Seconds())
	if abs := offset.Abs(); abs > c.MaxOffset.D() {
		severity, limit := finding.Warning, c.MaxOffset
		if abs > c.CriticalOffset.D() {
			severity, limit = finding.Critical, c.CriticalOffset
		}
		c.r.Add(finding.Finding{
			Reason: clockOffsetHigh, Severity: severity, Subject: daemon,
			Message:  fmt.Sprintf("the clock is %s from true time", short(abs)),
			Evidence: []finding.Evidence{{Source: source, Observed: short(offset), Expected: "below " + limit.String()}},
			Settled:  c.warm,
		})
	}
	if bound > maxBound.D() {
		c.r.Add(finding.Finding{
			Reason: clockErrorBoundHigh, Severity: finding.Warning, Subject: daemon,
			Message:  fmt.Sprintf("the clock may be off by up to %s", short(bound)),
			Evidence: []finding.Evidence{{Source: source, Observed: short(bound), Expected: "below " + maxBound.String()}},
		})
	}
}

// hypervisor compares with PTP clocks that deliver UTC. A network card's own
// PTP clock usually keeps TAI or runs free, so those are left alone.
func (c *clockCheck) hypervisor(ctx context.Context) {
	if !c.HypervisorClock {
		return
	}
	const class = "/sys/class/ptp"
	names, err := c.in.Host.ReadDir(ctx, class)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.errs = append(c.errs, err)
		}
		return
	}
	for _, name := range names {
		data, err := c.in.Host.ReadFile(ctx, class+"/"+name+"/clock_name")
		clock := strings.TrimSpace(string(data))
		if err != nil || !(clock == "hyperv" || clock == "KVM virtual PTP" || strings.HasPrefix(clock, "ena-ptp-")) {
			continue
		}
		offset, uncertainty, err := c.in.Host.PTPOffset(ctx, "/dev/"+name)
		if errors.Is(err, fs.ErrPermission) {
			c.errs = append(c.errs, fmt.Errorf("the hypervisor's clock (%s) can not be compared: %w", clock, err))
			continue
		}
		if err != nil {
			// Not a fault of the host: a hypervisor without the call (KVM answers
			// EOPNOTSUPP for a non-TSC clocksource).
			continue
		}
		if offset.Abs()-uncertainty <= c.MaxOffset.D() {
			c.r.Summary += fmt.Sprintf("; %s agrees within %s", clock, short(offset.Abs()+uncertainty))
			continue
		}
		c.r.Add(finding.Finding{
			Reason: clockDisagrees, Severity: finding.Warning, Subject: clock,
			Message: fmt.Sprintf("the hypervisor's clock (%s) differs by %s", clock, short(offset)),
			Evidence: []finding.Evidence{{Source: "/dev/" + name + " (" + clock + ")",
				Observed: fmt.Sprintf("%s ± %s", short(offset), short(uncertainty)), Expected: "within " + c.MaxOffset.String()}},
		})
	}
}

// timeDaemon is a running process that may steer the clock.
type timeDaemon struct {
	name, cgroup string
	pid          int
	started      uint64
}

func has(daemons []timeDaemon, name string) bool {
	return slices.ContainsFunc(daemons, func(d timeDaemon) bool { return d.name == name })
}

// runningTimeDaemons finds them by process, because a daemon in a container has
// no unit and still moves the host's clock. One daemon with helper processes
// counts once per cgroup. A process without CAP_SYS_TIME can not steer.
func runningTimeDaemons(ctx context.Context, h host.View) ([]timeDaemon, error) {
	index := func(comm string) int {
		return slices.IndexFunc(timeDaemons, func(d struct {
			comm, name string
			units      []string
		}) bool {
			return d.comm == comm
		})
	}
	procs, err := processesNamed(ctx, h, func(comm string) bool { return index(comm) >= 0 }, true)
	if err != nil {
		return nil, err
	}
	var found []timeDaemon
	for _, p := range procs {
		i := index(p.Comm)
		if p.Kernel || p.State == 'Z' {
			continue
		}
		dir := "/proc/" + strconv.Itoa(p.PID)
		status, err := h.ReadFile(ctx, dir+"/status")
		if gone(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if may, known := canSetTime(status); known && !may {
			continue
		}
		// In a user namespace of its own, which anybody may make, a process has
		// every capability and may still not set the time.
		if !sharesWithInit(ctx, h, p.PID, "user") {
			continue
		}
		if cmdline, err := h.ReadFile(ctx, dir+"/cmdline"); err == nil && p.Comm == "chronyd" && chronydIsReadOnly(cmdline) {
			continue
		}
		cgroup := "an unknown cgroup"
		if data, err := h.ReadFile(ctx, dir+"/cgroup"); err == nil {
			cgroup = cgroupOf(data)
		}
		d := timeDaemon{name: timeDaemons[i].name, cgroup: cgroup, pid: p.PID, started: p.StartTicks}
		if !slices.ContainsFunc(found, func(o timeDaemon) bool { return o.name == d.name && o.cgroup == d.cgroup }) {
			found = append(found, d)
		}
	}
	return found, nil
}

// gone reports that a process ended while it was being read.
func gone(err error) bool {
	return errors.Is(err, fs.ErrNotExist) || errors.Is(err, syscall.ESRCH)
}

func closedPort(err error) bool {
	return errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, fs.ErrNotExist)
}

// canSetTime reads CAP_SYS_TIME (bit 25) from CapEff of proc_pid_status(5).
func canSetTime(status []byte) (may, known bool) {
	for line := range bytes.Lines(status) {
		if hex, ok := bytes.CutPrefix(line, []byte("CapEff:")); ok {
			caps, err := strconv.ParseUint(string(bytes.TrimSpace(hex)), 16, 64)
			return err == nil && caps&(1<<25) != 0, err == nil
		}
	}
	return false, false
}

// chronydIsReadOnly looks for -x, with which chronyd serves time and does not
// touch the clock.
func chronydIsReadOnly(cmdline []byte) bool {
	for arg := range bytes.SplitSeq(cmdline, []byte{0}) {
		if len(arg) > 1 && arg[0] == '-' && arg[1] != '-' && bytes.IndexByte(arg, 'x') > 0 {
			return true
		}
	}
	return false
}

// cgroupOf returns the cgroup v2 path of /proc/PID/cgroup, or that of systemd's
// named v1 hierarchy.
func cgroupOf(data []byte) string {
	var v1 string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSuffix(line, "\n")
		if p, ok := strings.CutPrefix(line, "0::"); ok && p != "" {
			return p
		}
		if _, rest, ok := strings.Cut(line, ":name=systemd:"); ok {
			v1 = rest
		}
	}
	return cmp.Or(v1, "/")
}

// timeUnitChanging names a time daemon's unit that has a job queued, or is
// between two restarts: what follows from that is no finding.
func timeUnitChanging(ctx context.Context, h host.View) (string, error) {
	var names []string
	for _, d := range timeDaemons {
		names = append(names, d.units...)
	}
	units, err := h.Units(ctx, names...)
	if errors.Is(err, host.ErrNoSystemd) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	for _, u := range units {
		if u.Job || u.Active == "activating" || u.Active == "reloading" || u.Active == "deactivating" {
			return u.Name, nil
		}
	}
	return "", nil
}

// ntpMessage is the part of timesyncd's NTPMessage that matters.
type ntpMessage struct {
	stratum                   int
	offset                    time.Duration
	rootDelay, rootDispersion time.Duration
	packets                   int64
}

// parseNTPMessage reads the tuple (uuuuittayttttbtt) of timesyncd's
// bus_property NTPMessage: leap, version, mode, stratum, precision, root delay,
// root dispersion, reference id, origin, receive, transmit, destination times
// (µs since the epoch), spike, packet count, jitter. Before the first packet
// the times are garbage, so the count is looked at first.
func parseNTPMessage(v any) (ntpMessage, error) {
	tuple, ok := v.([]any)
	if !ok || len(tuple) < 15 {
		return ntpMessage{}, fmt.Errorf("NTPMessage has an unexpected shape (%T)", v)
	}
	var n [15]float64
	for i := range n {
		n[i], _ = tuple[i].(float64)
	}
	m := ntpMessage{packets: int64(n[13])}
	if m.packets == 0 {
		return m, nil
	}
	const origin, receive, transmit, destination = 8, 9, 10, 11
	us := ((n[receive] - n[origin]) + (n[transmit] - n[destination])) / 2
	const year = 365 * 24 * 3600 * 1e6
	if us > 200*year || us < -200*year {
		return ntpMessage{}, errors.New("NTPMessage carries impossible times")
	}
	m.stratum = int(n[3])
	m.offset = time.Duration(us * 1e3)
	m.rootDelay, m.rootDispersion = time.Duration(n[5])*time.Microsecond, time.Duration(n[6])*time.Microsecond
	return m, nil
}

// refName is how chronyc shows a reference that is no address: four ASCII
// characters such as "PHC0" or "GPS".
func refName(id uint32) string {
	b := []byte{byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id)}
	if id == refLocal {
		return "its own clock"
	}
	b = bytes.TrimRight(b, "\x00")
	for _, c := range b {
		if c < 0x21 || c > 0x7e {
			return fmt.Sprintf("reference %08X", id)
		}
	}
	return string(b)
}

// short rounds a duration to three digits, as a person would say it.
func short(d time.Duration) string {
	abs, unit := d.Abs(), time.Duration(1)
	for abs/unit >= 1000 {
		unit *= 10
	}
	return d.Round(unit).String()
}
