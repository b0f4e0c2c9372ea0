package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Updates checks that security updates reach the host and take effect: something
// installs them, it works, and no reboot is left undone.
type Updates struct {
	Common
	// RebootAfter is how long a reboot may be pending before it is a problem.
	RebootAfter Duration `json:"rebootAfter,omitempty"`
	// StaleAfter is how old the last success of automatic updates may be.
	StaleAfter Duration `json:"staleAfter,omitempty"`
}

// DefaultUpdates returns the default settings.
func DefaultUpdates() Updates {
	const week = Duration(7 * 24 * time.Hour)
	return Updates{RebootAfter: week, StaleAfter: week}
}

// Rarely implements [Probe].
func (Updates) Rarely() bool { return true }

// Name implements [Probe].
func (Updates) Name() string { return "updates" }

// Condition implements [Probe].
func (Updates) Condition() string { return ConditionPrefix + "UpdateProblem" }

// Wakes implements [Probe]. Configuration files that are there are known after a
// look.
func (Updates) Wakes(Require) Wakes {
	w := Wakes{UnitFiles: true, Units: updaterUnits()}
	for _, m := range rebootMarkers {
		w.Files = append(w.Files, followed(m.file)...)
	}
	w.Files = append(w.Files, followed(modulesDir+"/")...)
	for _, dir := range rpmDirs { // as the packages probe does, with its reason
		for _, f := range rpmFiles {
			w.Files = append(w.Files, host.FollowedFile{Name: path.Join(dir, f), On: host.FileWritten})
		}
	}
	return w
}

// Validate implements [Probe].
func (p Updates) Validate() error {
	return errors.Join(positive("rebootAfter", p.RebootAfter), positive("staleAfter", p.StaleAfter))
}

// Rules implements [Probe].
func (Updates) Rules() []finding.Rule {
	return []finding.Rule{{
		Reason: "UpdatesNotConfigured", Severity: finding.Info,
		Means: "Nothing installs security updates on this host by itself: no updater is there, or it is switched off. Information, for nodes may be replaced instead of updated.",
		Do:    "Install and enable the distribution's own: unattended-upgrades, dnf-automatic with apply_updates = yes, transactional-update.timer. Where nodes are replaced regularly there is nothing to do; to be warned all the same set severity: {UpdatesNotConfigured: warning}.",
	}, {
		Reason: "UpdatesNotRunning", Severity: finding.Warning,
		Means:      "Security updates are configured to be installed, but the unit that does it is enabled and not active.",
		Do:         "Start the unit in the evidence, and see in its journal why it stopped.",
		HoldBefore: 10 * time.Minute, HoldWhy: "units are stopped while packages are upgraded",
	}, {
		Reason: "UpdatesFailing", Severity: finding.Warning,
		Means: "Automatic updates run and fail, or have not succeeded for longer than probes.updates.staleAfter.",
		Do:    "Look at the journal of the unit in the evidence, and at /var/log/unattended-upgrades on Debian and Ubuntu: a repository that can not be reached and a broken package database (see PackageManagerBroken) are the usual causes.",
	}, {
		Reason: "RebootPending", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
		Means: "Installed updates take effect with the next reboot only, which has been due for longer than probes.updates.rebootAfter; information until then.",
		Do:    "Drain the node and reboot it, or let kured do it: it looks for the file in the evidence.",
	}, {
		Reason: "KernelOutdated", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
		Means: "The running kernel is older than the newest installed one of its kind, for longer than probes.updates.rebootAfter; information until then, and while a live patch is in force.",
		Do:    "Drain the node and reboot it. If it comes back with the old kernel, the boot loader is told to start that one.",
	}, {
		Reason: "RebootConflict", Severity: finding.Warning,
		Means: "The host reboots itself after updates, although it is a node of a cluster: pods are killed without a drain, several nodes may go at once, and kured, where it runs, does not know.",
		Do:    "Switch the automatic reboot off in the file that the evidence names and let kured, or whatever upgrades the nodes, reboot: Unattended-Upgrade::Automatic-Reboot \"false\", reboot = never, REBOOT_METHOD=kured, REBOOT_STRATEGY=off, strategy = \"fleet_lock\".",
	}}
}

// Check implements [Probe].
func (p Updates) Check(ctx context.Context, in Input) (finding.Result, error) {
	c := updatesPass{Updates: p, Input: in, ctx: ctx}
	c.run()
	return c.r, errors.Join(c.errs...)
}

// updatesPass is one pass.
type updatesPass struct {
	Updates
	Input
	ctx  context.Context
	r    finding.Result
	errs []error

	os    host.OS
	units map[string]host.Unit // nil where there is no systemd
	facts []string
	// unseen: what may be configured could not be read.
	unseen bool
}

func (c *updatesPass) fail(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

func (c *updatesPass) run() {
	var err error
	if c.os, err = c.Host.OS(c.ctx); err != nil {
		c.fail("which system this is: %w", err)
	}
	names := updaterUnits()
	units, err := c.Host.Units(c.ctx, names...)
	switch {
	case errors.Is(err, host.ErrNoSystemd):
	case err != nil:
		c.fail("units that update the system: %w", err)
		c.unseen = true
	default:
		c.units = make(map[string]host.Unit, len(units))
		for i, u := range units {
			c.units[names[i]] = u
		}
	}
	found, known := c.updaters()
	working := c.judgeUpdaters(found, known)
	pending := c.judgePending()
	kernel := c.judgeKernel()
	c.judgeReboots(working)
	c.r.NotApplicable = !known && len(found) == 0 && !pending && !kernel
	if c.r.NotApplicable {
		c.facts = []string{"how " + c.os.ID + " is updated is not known"}
		if c.os.Class != host.Mutable {
			c.facts = []string{"this system is updated as an image, by what is not on the host"}
		}
	}
	c.r.Summary = strings.Join(c.facts, "; ")
}

// An updater is something that installs updates by itself.
type updater struct {
	name string
	// installs: as it is configured it installs security updates, and unit is not
	// switched off. shown is what tells, either way.
	installs bool
	shown    []finding.Evidence
	// unit must be active: a timer, or a service that is always there. service is
	// what the timer starts, whose result tells; "" for none.
	unit, service string
	// every is how often it runs, 0 when that is not known or every day.
	every time.Duration
	// last is when it last succeeded, by lastFrom; zero when that is not known.
	last     time.Time
	lastFrom string
	// reboots says, if it reboots the host, by what.
	reboots *finding.Evidence
}

// switchedOff reports whether somebody has decided against a unit.
func (c *updatesPass) switchedOff(name string) bool {
	if c.units == nil {
		return false
	}
	u := c.units[name]
	return u.Load == "not-found" || u.Load == "masked" || !u.Running() && !enabledAtBoot(u.FileState)
}

// there reports whether systemd knows the unit.
func (c *updatesPass) there(name string) bool {
	u, ok := c.units[name]
	return ok && u.Load != "not-found"
}

func (c *updatesPass) unitShown(name string) finding.Evidence {
	u := c.units[name]
	return finding.Evidence{Source: name, Observed: strings.TrimSpace(unitState(u) + " " + u.FileState), Expected: "enabled and active"}
}

// judgeUpdaters returns those that are at work.
func (c *updatesPass) judgeUpdaters(found []updater, known bool) []updater {
	var working []updater
	var shown []finding.Evidence
	for _, u := range found {
		shown = append(shown, u.shown...)
		if u.installs && u.unit != "" && c.switchedOff(u.unit) {
			u.installs = false
			shown = append(shown, c.unitShown(u.unit))
		}
		if u.installs {
			working = append(working, u)
		}
	}
	if len(working) == 0 {
		if known && !c.unseen {
			if len(shown) == 0 {
				shown = []finding.Evidence{{Source: "units and configuration of this host", Observed: "no updater", Expected: expectedUpdater(c.os)}}
			}
			c.r.Add(finding.Finding{
				Reason: "UpdatesNotConfigured", Severity: finding.Info,
				Message: "nothing installs security updates on this host by itself", Evidence: shown,
			})
		}
		return nil
	}
	var newest time.Time
	for _, u := range working {
		text := u.name + " installs security updates"
		if !u.last.IsZero() {
			text += ", last successfully on " + u.last.UTC().Format(time.DateOnly)
			if u.last.After(newest) {
				newest = u.last
			}
		}
		c.facts = append(c.facts, text)
		c.judgeWorking(u)
	}
	if !newest.IsZero() {
		c.r.Sample("hosthygiene_updates_last_success_timestamp_seconds", float64(newest.Unix()))
	}
	return slices.DeleteFunc(working, func(u updater) bool {
		unit, ok := c.units[u.unit]
		return ok && !unit.Running()
	})
}

func (c *updatesPass) judgeWorking(u updater) {
	unit, haveUnits := c.units[u.unit]
	if haveUnits && !unit.Running() {
		c.r.Add(finding.Finding{
			Reason: "UpdatesNotRunning", Severity: finding.Warning, Subject: u.name,
			Message:  fmt.Sprintf("%s is configured to install security updates, but %s is not active", u.name, u.unit),
			Evidence: append(slices.Clone(u.shown), c.unitShown(u.unit)),
		})
		return
	}
	if service, ok := c.units[u.service]; ok && !service.Running() && service.Result != "" && service.Result != "success" {
		c.r.Add(finding.Finding{
			Reason: "UpdatesFailing", Severity: finding.Warning, Subject: u.name,
			Message:  fmt.Sprintf("%s failed when it last ran: security updates may be missing", u.name),
			Evidence: []finding.Evidence{{Source: u.service, Observed: unitState(service), Expected: "success"}},
		})
		return
	}
	// A host that was off for long, or is new, is given a day to catch up.
	begun := unit.ActiveSince
	if begun.Before(c.os.BootTime) {
		begun = c.os.BootTime
	}
	if !begun.IsZero() && c.Now.Sub(begun) < 24*time.Hour {
		return
	}
	since, limit := u.last, max(c.StaleAfter.D(), 2*u.every)
	e := finding.Evidence{Source: u.lastFrom, Observed: "last success on " + since.UTC().Format(time.RFC3339), Expected: "less than " + age(limit) + " ago"}
	if since.IsZero() {
		if u.lastFrom == "" || unit.ActiveSince.IsZero() {
			return
		}
		since, e.Observed = unit.ActiveSince, "never succeeded"
	}
	if c.Now.Sub(since) < limit {
		return
	}
	c.r.Add(finding.Finding{
		Reason: "UpdatesFailing", Severity: finding.Warning, Subject: u.name,
		Message:  fmt.Sprintf("%s has not installed updates successfully since %s", u.name, since.UTC().Format(time.DateOnly)),
		Evidence: []finding.Evidence{e},
	})
}

// age says how long something is in whole days, or hours.
func age(d time.Duration) string {
	const day = 24 * time.Hour
	if d >= 2*day {
		return fmt.Sprintf("%d days", d/day)
	}
	if h := d.Round(time.Hour) / time.Hour; h != 1 {
		return fmt.Sprintf("%d hours", h)
	}
	return "1 hour"
}

// rebootMarkers are files that say a reboot is due, by who leaves them. Another
// agent's remedy leaves the first as well.
var rebootMarkers = []struct {
	file, by string
	// packages is a list that lies beside it.
	packages string
}{
	// unattended-upgrades, update-notifier-common, kured's own convention.
	{"/run/reboot-required", "package management", "/run/reboot-required.pkgs"},
	// libzypp (zypper needs-rebooting) and zypp-boot-plugin.
	{"/run/reboot-needed", "zypper", ""},
	// ostree: rpm-ostree and bootc put an update there until the shutdown.
	{"/run/ostree/staged-deployment", "ostree", ""},
	// update_engine of Flatcar (src/update_engine/update_attempter.cc).
	{"/run/update_engine_autoupdate_completed", "update_engine", ""},
}

// judgePending reports whether a reboot is due.
func (c *updatesPass) judgePending() bool {
	var since time.Time
	var shown []finding.Evidence
	var packages []string
	at := func(t time.Time) {
		if since.IsZero() || t.Before(since) {
			since = t
		}
	}
	for _, m := range rebootMarkers {
		st, err := c.Host.Stat(c.ctx, m.file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			c.fail("whether a reboot is pending: %w", err)
			continue
		}
		at(st.ModTime)
		shown = append(shown, finding.Evidence{Source: m.file, Observed: "left by " + m.by + " at " + st.ModTime.UTC().Format(time.RFC3339), Expected: "not there"})
		if m.packages == "" {
			continue
		}
		data, err := c.Host.ReadFileMax(c.ctx, m.packages, 1<<20)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			c.fail("packages that need the reboot: %w", err)
		}
		packages = append(packages, parseRebootPackages(data)...)
	}
	for _, p := range c.replacedSinceBoot() {
		at(p.at)
		packages = append(packages, p.name)
		shown = append(shown, finding.Evidence{Source: "rpm -q " + p.name, Observed: "installed at " + p.at.UTC().Format(time.RFC3339), Expected: "before the boot at " + c.os.BootTime.UTC().Format(time.RFC3339)})
	}
	if len(shown) == 0 {
		c.r.Sample("hosthygiene_reboot_required", 0)
		c.facts = append(c.facts, "no reboot is pending")
		return false
	}
	c.r.Sample("hosthygiene_reboot_required", 1)
	severity := finding.Info
	if c.Now.Sub(since) >= c.RebootAfter.D() {
		severity = finding.Warning
	}
	message := "a reboot is pending since " + since.UTC().Format(time.DateOnly)
	slices.Sort(packages)
	if packages = slices.Compact(packages); len(packages) > 0 {
		message += ", for " + list(packages, 5)
	}
	c.r.Add(finding.Finding{Reason: "RebootPending", Severity: severity, Message: message, Evidence: shown})
	return true
}

// parseRebootPackages reads reboot-required.pkgs: a name a line, repeated by each
// upgrade.
func parseRebootPackages(data []byte) []string {
	var names []string
	for line := range bytes.Lines(data) {
		if name := string(bytes.TrimSpace(line)); name != "" && validPackageName(name) && !slices.Contains(names, name) && len(names) < 1000 {
			names = append(names, name)
		}
	}
	return names
}

// installedAt is when rpm installed a package.
type installedAt struct {
	name string
	at   time.Time
}

// keptInstalls is rpm's answer about one state of its database.
type keptInstalls struct {
	state string
	list  []installedAt
}

// rebootPackages are those that `dnf needs-restarting -r` asks a reboot for
// (dnf-plugins-core, plugins/needs_restarting.py), but for the kernel.
var rebootPackages = []string{"dbus", "dbus-broker", "dbus-daemon", "glibc", "linux-firmware", "microcode_ctl", "systemd"}

// replacedSinceBoot are packages in use since the boot that have been replaced,
// where nothing leaves a marker: dnf does not, zypper and apt do.
func (c *updatesPass) replacedSinceBoot() []installedAt {
	f := familyOf(c.os, "")
	if c.os.Class != host.Mutable || f != redHatFamily && f != azureLinuxFamily || c.os.BootTime.IsZero() {
		return nil
	}
	db, ok, err := findRPM(c.ctx, c.Host)
	if err != nil {
		c.fail("rpm's database: %w", err)
	}
	if !ok || err != nil {
		return nil
	}
	kept, ok := Kept[keptInstalls](c.Memory, "installs")
	if !ok || kept.state != db.state {
		out, err := c.Host.Run(c.ctx, host.RPMInstallTimes(rebootPackages...))
		if err != nil {
			if !errors.Is(err, host.ErrNotLive) {
				c.fail("when packages were installed: %w", err)
			}
			return nil
		}
		kept = keptInstalls{state: db.state, list: parseInstallTimes(out.Stdout)}
		c.Memory.Keep("installs", kept)
	}
	var late []installedAt
	for _, p := range kept.list {
		if p.at.After(c.os.BootTime) {
			late = append(late, p)
		}
	}
	return late
}

const modulesDir = "/lib/modules"

// judgeKernel reports whether the kernels of this host can be told apart.
func (c *updatesPass) judgeKernel() bool {
	if c.os.Class != host.Mutable || c.os.Kernel == "" {
		return false
	}
	names, err := c.Host.ReadDir(c.ctx, modulesDir)
	if errors.Is(err, fs.ErrNotExist) {
		return false
	}
	if err != nil {
		c.fail("which kernels are installed: %w", err)
		return false
	}
	flavour := kernelFlavour(c.os.Kernel)
	newest := c.os.Kernel
	for _, name := range names {
		if kernelFlavour(name) == flavour && compareKernels(name, newest) > 0 && c.bootable(name) {
			newest = name
		}
	}
	if newest == c.os.Kernel {
		if slices.Contains(names, c.os.Kernel) {
			c.facts = append(c.facts, "no newer kernel than the running "+c.os.Kernel+" is installed")
		}
		return slices.Contains(names, c.os.Kernel)
	}
	f := finding.Finding{
		Reason: "KernelOutdated", Severity: finding.Info,
		Message:  fmt.Sprintf("the running kernel is %s, the newest installed one %s", c.os.Kernel, newest),
		Evidence: []finding.Evidence{{Source: "/proc/sys/kernel/osrelease", Observed: c.os.Kernel, Expected: newest}},
	}
	// depmod writes it when the kernel is installed; the image has the time of
	// its build.
	if st, err := c.Host.Stat(c.ctx, modulesDir+"/"+newest+"/modules.dep"); err == nil {
		f.Evidence = append(f.Evidence, finding.Evidence{Source: modulesDir + "/" + newest, Observed: "installed at " + st.ModTime.UTC().Format(time.RFC3339)})
		if c.Now.Sub(st.ModTime) >= c.RebootAfter.D() {
			f.Severity = finding.Warning
		}
	}
	if patches, err := c.Host.ReadDir(c.ctx, "/sys/kernel/livepatch"); err == nil && len(patches) > 0 {
		f.Severity = finding.Info
		f.Message += "; a live patch is in force"
		f.Evidence = append(f.Evidence, finding.Evidence{Source: "/sys/kernel/livepatch", Observed: list(patches, 3)})
	}
	c.r.Add(f)
	return true
}

// bootable reports whether a kernel's image is there: of one that was removed the
// directory may stay behind, with modules built on the host.
func (c *updatesPass) bootable(release string) bool {
	for _, name := range []string{"/boot/vmlinuz-" + release, modulesDir + "/" + release + "/vmlinuz", "/boot/Image-" + release, "/boot/vmlinux-" + release} {
		if _, err := c.Host.Stat(c.ctx, name); err == nil {
			return true
		}
	}
	return false
}

// judgeReboots tells of hosts that are nodes and reboot themselves.
func (c *updatesPass) judgeReboots(working []updater) {
	working = slices.DeleteFunc(slices.Clone(working), func(u updater) bool { return u.reboots == nil })
	if len(working) == 0 {
		return
	}
	procs, err := processesNamed(c.ctx, c.Host, func(comm string) bool { return kubeletProgram(comm) != "" || comm == "kured" }, false)
	if err != nil {
		c.fail("whether this is a node: %w", err)
		return
	}
	if !slices.ContainsFunc(procs, func(p host.Process) bool { return kubeletProgram(p.Comm) != "" }) {
		return
	}
	kured := slices.ContainsFunc(procs, func(p host.Process) bool { return p.Comm == "kured" })
	for _, u := range working {
		message := fmt.Sprintf("%s reboots this node by itself after updates, without draining it", u.name)
		e := []finding.Evidence{*u.reboots}
		if kured {
			message += ", and kured runs here"
			e = append(e, finding.Evidence{Source: "process table", Observed: "kured"})
		}
		c.r.Add(finding.Finding{Reason: "RebootConflict", Severity: finding.Warning, Subject: u.name, Message: message, Evidence: e})
	}
}
