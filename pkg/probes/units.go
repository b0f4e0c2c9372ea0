package probes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Units checks that the systemd units this host must have are there, enabled
// and running, that none of those storage, time and containers depend on has
// failed or keeps being restarted, and that the files of require.files say what
// they must: they are drop-ins of ours for those services.
type Units struct {
	Common
	// MaxRestarts is how many automatic restarts of one unit within
	// RestartWindow are too many. systemd's own limit, five within ten seconds,
	// never stops a unit that waits between two starts.
	MaxRestarts int `json:"maxRestarts"`
	// RestartWindow is the time within which they are counted.
	RestartWindow Duration `json:"restartWindow"`
}

// DefaultUnits returns the default settings.
func DefaultUnits() Units { return Units{MaxRestarts: 5, RestartWindow: Duration(10 * time.Minute)} }

// Name implements [Probe].
func (Units) Name() string { return "units" }

// Condition implements [Probe].
func (Units) Condition() string { return ConditionPrefix + "ServiceProblem" }

// Wakes implements [Probe].
func (Units) Wakes(r Require) Wakes {
	w := Wakes{Units: watchedUnits(), UnitFiles: true}
	for _, u := range r.Units {
		w.Units = append(w.Units, u.Name)
	}
	for _, f := range r.Files {
		w.Files = append(w.Files, host.FollowedFile{Name: f.Path})
	}
	return w
}

// Validate implements [Probe].
func (p Units) Validate() error {
	var errs []error
	if p.MaxRestarts < 1 {
		errs = append(errs, fieldErr("maxRestarts", "want 1 or more, not %d", p.MaxRestarts))
	}
	return errors.Join(append(errs, positive("restartWindow", p.RestartWindow))...)
}

// Rules implements [Probe].
func (Units) Rules() []finding.Rule {
	return []finding.Rule{{
		Reason:   "RequiredUnitMissing",
		Severity: finding.Critical,
		Means:    "systemd knows no unit of a name that require.units lists.",
		Do:       "Install what brings the unit, or correct the name; `systemctl list-unit-files` shows those there are.",
	}, {
		Reason:     "RequiredUnitNotActive",
		Severity:   finding.Critical,
		Means:      "A unit that must run does not.",
		Do:         "`systemctl status UNIT` and its journal say why; `systemctl start UNIT`. A oneshot unit without RemainAfterExit=yes is never active: require it with active: false.",
		HoldBefore: 15 * time.Second,
		HoldWhy:    "Restart= brings a unit that died back within seconds, without a job that would be seen; told at once when systemd has given it up (inactive or failed, and not waiting for a restart)",
	}, {
		Reason:   "RequiredUnitMasked",
		Severity: finding.Critical,
		Also:     []finding.Severity{finding.Warning},
		Means:    "A unit that is required is masked, so that nothing can start it. A warning while it still runs.",
		Do:       "Find out who masked it and why; `systemctl unmask UNIT`.",
	}, {
		Reason:   "RequiredUnitNotEnabled",
		Severity: finding.Warning,
		Means:    "A unit that must be started at boot is not enabled: after the next reboot it is missing.",
		Do:       "systemctl enable UNIT",
	}, {
		Reason:   "UnwantedUnitActive",
		Severity: finding.Warning,
		Means:    "A unit that require.units wants stopped runs.",
		Do:       "`systemctl stop UNIT`, once nothing needs it.",
	}, {
		Reason:   "UnwantedUnitEnabled",
		Severity: finding.Warning,
		Means:    "A unit that require.units wants disabled is started at boot.",
		Do:       "systemctl disable UNIT",
	}, {
		Reason:   "UnitFailed",
		Severity: finding.Warning,
		Means:    "A unit that storage, time or containers depend on has failed.",
		Do:       "`systemctl status UNIT` and its journal say why; restart it once the cause is gone. Never restart iscsi.service or open-iscsi.service for it: stopping those logs out of every session.",
	}, {
		Reason:   "UnitRestarting",
		Severity: finding.Warning,
		Means:    "A unit that storage, time or containers depend on dies and is started again and again.",
		Do:       "Its journal says why it ends; `systemctl show -p NRestarts UNIT` counts.",
		HoldWhy:  "restartWindow is the hold, both ways",
	}, {
		Reason:   "FileMissing",
		Severity: finding.Warning,
		Means:    "A file that require.files lists is not there.",
		Do:       "Write it as the config has it, or let remedies do it.",
	}, {
		Reason:   "FileDiffers",
		Severity: finding.Warning,
		Means:    "A file that require.files lists has another content.",
		Do:       "Find out who wrote it, then write it as the config has it, or let remedies do it. What belongs to the host goes into a file of another name.",
	}, {
		Reason:   "FileModeWrong",
		Severity: finding.Warning,
		Means:    "A file that require.files lists has another mode or owner.",
		Do:       "chmod and chown as the config has it, or let remedies do it.",
	}, {
		Reason:   "FileNotRegular",
		Severity: finding.Warning,
		Means:    "Where require.files wants a file is something else: a symbolic link, a directory, a device, or a directory above it is a link. It is neither read nor repaired.",
		Do:       "Remove it, or require another path.",
	}}
}

// watchedUnits are those whose failure or restarting is told although nobody
// required them: what storage, time and containers depend on. One that the host
// does not have is not looked for.
func watchedUnits() []string {
	return []string{
		"chrony.service", "chronyd.service", "systemd-timesyncd.service", "ntpd.service", "ntpsec.service",
		"iscsid.service", "iscsid.socket", "iscsi.service", "open-iscsi.service", "iscsi-init.service", "multipathd.service",
		"rpcbind.service", "rpc-statd.service", "nfs-client.target", "rpc-gssd.service", "nfs-blkmap.service",
		"glusterd.service", "gluster-blockd.service", "tcmu-runner.service",
		"lvm2-monitor.service", "mdmonitor.service", "nvmf-autoconnect.service",
		"systemd-udevd.service", "systemd-modules-load.service", "systemd-sysctl.service", "dbus.service", "dbus-broker.service",
		"containerd.service", "crio.service", "docker.service", "cri-docker.service",
		"kubelet.service", "k3s.service", "k3s-agent.service", "rke2-server.service", "rke2-agent.service",
	}
}

// Check implements [Probe].
func (p Units) Check(ctx context.Context, in Input) (finding.Result, error) {
	var r finding.Result
	var errs []error
	required, watched, err := listUnits(ctx, in)
	noSystemd := errors.Is(err, host.ErrNoSystemd)
	switch {
	case noSystemd && len(in.Require.Units) > 0:
		errs = append(errs, fmt.Errorf("the required units: %w", err))
	case err != nil && !noSystemd:
		errs = append(errs, fmt.Errorf("state of the units: %w", err))
	case err == nil:
		p.judgeUnits(&r, in, required, watched)
	}
	files, err := judgeFiles(ctx, in, &r)
	errs = append(errs, err)

	var said []string
	switch {
	case noSystemd:
		said = append(said, "no systemd here")
	case len(required)+len(watched) > 0:
		said = append(said, fmt.Sprintf("units required: %d; of storage, time and containers looked at: %d", len(required), len(watched)))
	}
	if files > 0 {
		said = append(said, fmt.Sprintf("files required: %d", files))
	}
	r.Summary = strings.Join(said, "; ")
	r.NotApplicable = noSystemd && len(in.Require.Units) == 0 && files == 0
	return r, errors.Join(errs...)
}

// listUnits returns the required units, in the order of the config, and those of
// [watchedUnits] that systemd has loaded; a failed unit always is.
func listUnits(ctx context.Context, in Input) (required, watched []host.Unit, err error) {
	if len(in.Require.Units) > 0 {
		names := make([]string, len(in.Require.Units))
		for i, u := range in.Require.Units {
			names[i] = u.Name
		}
		if required, err = in.Host.Units(ctx, names...); err != nil {
			return nil, nil, err
		}
		if len(required) != len(names) {
			return nil, nil, fmt.Errorf("asked for %d units, got %d", len(names), len(required))
		}
	}
	watched, err = in.Host.UnitsMatching(ctx, watchedUnits()...)
	return required, watched, err
}

func (p Units) judgeUnits(r *finding.Result, in Input, required, watched []host.Unit) {
	told := map[string]bool{} // by systemd's own name
	for i, u := range required {
		if judgeRequired(r, in.Require, in.Require.Units[i], u) {
			told[unitID(u)] = true
		}
	}
	seen := map[string]bool{}
	all := slices.Concat(required, watched)
	counts, _ := Kept[map[string][]restartCount](in.Memory, "restarts")
	next := make(map[string][]restartCount, len(all))
	for _, u := range all {
		id := unitID(u)
		if seen[id] || u.Load == "not-found" {
			continue // an alias of one that was looked at
		}
		seen[id] = true
		next[id] = countRestarts(counts[id], in.Now, u.NRestarts, p.RestartWindow.D())
		if u.Job {
			continue
		}
		if u.Active == "failed" && !told[id] {
			r.Add(finding.Finding{
				Reason: "UnitFailed", Severity: finding.Warning, Subject: id,
				Message:  fmt.Sprintf("%s has failed%s: what depends on it does not work", id, resultOf(u)),
				Evidence: []finding.Evidence{{Source: id, Observed: unitState(u), Expected: "not failed"}},
			})
		}
		if n := u.NRestarts - next[id][0].n; n >= p.MaxRestarts {
			r.Add(finding.Finding{
				Reason: "UnitRestarting", Severity: finding.Warning, Subject: id,
				Message:  fmt.Sprintf("%s was started again %d times within %s: it does not stay up", id, n, p.RestartWindow),
				Evidence: []finding.Evidence{{Source: id + ", NRestarts", Observed: fmt.Sprintf("%d, up from %d at %s", u.NRestarts, next[id][0].n, next[id][0].at.UTC().Format(time.RFC3339)), Expected: fmt.Sprintf("fewer than %d more within %s", p.MaxRestarts, p.RestartWindow)}},
			})
		}
	}
	in.Memory.Keep("restarts", next)
}

// downForGood: systemd itself will not start the unit again. One that Restart=
// brings back goes from "deactivating" to "activating (auto-restart)" in one step
// (systemd, src/core/service.c, service_enter_dead) and shows neither state.
func downForGood(u host.Unit) bool {
	return !u.Job && u.Load == "loaded" && (u.Active == "inactive" || u.Active == "failed")
}

func unitID(u host.Unit) string { return cmp.Or(u.ID, u.Name) }

func unitState(u host.Unit) string {
	s := fmt.Sprintf("%s (%s)", u.Active, u.Sub)
	if u.Result != "" && u.Result != "success" {
		s += ", " + u.Result
	}
	return s
}

func resultOf(u host.Unit) string {
	if u.Result == "" || u.Result == "success" {
		return ""
	}
	return " (" + u.Result + ")"
}

// judgeRequired judges one required unit and reports whether it told that the
// unit does not run.
func judgeRequired(r *finding.Result, require Require, want RequiredUnit, u host.Unit) (toldDown bool) {
	if u.Job {
		return true // a restart is under way: nothing about it is settled
	}
	id := unitID(u)
	add := func(reason string, severity finding.Severity, action, message, observed, expected string) {
		f := finding.Finding{
			Reason: reason, Severity: severity, Subject: want.Name, Message: message,
			Evidence: []finding.Evidence{{Source: id, Observed: observed, Expected: expected}},
		}
		if action != "" {
			f.Remedy = &finding.Remedy{Action: action, Subject: id}
		}
		r.Add(f)
	}
	mustRun, mustStart := want.MustRun(), want.MustStart()
	// A unit waiting for its next automatic restart is "activating".
	running := u.Running() && u.Sub != "auto-restart"
	needed := mustRun || mustStart
	if needed && u.Load == "not-found" {
		// What a required package brings can be enabled once it is installed.
		action := ""
		if broughtByPackage(require, want.Name) {
			if action = finding.StartUnit; mustStart {
				action = finding.EnableUnit
			}
		}
		add("RequiredUnitMissing", finding.Critical, action,
			fmt.Sprintf("%s is required on this host and does not exist: what needs it does not work", want.Name), "no such unit", "a unit of this name")
		return true
	}
	if needed && (u.Load == "masked" || strings.HasPrefix(u.FileState, "masked")) {
		severity, consequence := finding.Critical, "nothing can start it"
		if running || !mustRun {
			severity, consequence = finding.Warning, "it does not come back once it stops or the host reboots"
		}
		add("RequiredUnitMasked", severity, finding.UnmaskUnit,
			fmt.Sprintf("%s is required on this host and masked: %s", want.Name, consequence), cmp.Or(u.FileState, "masked")+", "+unitState(u), "not masked")
		return true
	}
	if mustRun && !running {
		add("RequiredUnitNotActive", finding.Critical, finding.StartUnit,
			fmt.Sprintf("%s must run on this host and is %s%s: what needs it does not work", want.Name, cmp.Or(u.Active, "inactive"), resultOf(u)), unitState(u), "active")
		r.Findings[len(r.Findings)-1].Settled = downForGood(u)
		toldDown = true
	}
	if want.Active != nil && !*want.Active && u.Active == "active" {
		add("UnwantedUnitActive", finding.Warning, "",
			fmt.Sprintf("%s must not run on this host and does", want.Name), unitState(u), "inactive")
	}
	switch enabled := enabledAtBoot(u.FileState); {
	case mustStart && !enabled:
		add("RequiredUnitNotEnabled", finding.Warning, finding.EnableUnit,
			fmt.Sprintf("%s must be started at boot and is not enabled: after the next reboot it is missing", want.Name), cmp.Or(u.FileState, "no state"), "enabled")
	case want.Enabled != nil && !*want.Enabled && (u.FileState == "enabled" || u.FileState == "enabled-runtime"):
		add("UnwantedUnitEnabled", finding.Warning, "",
			fmt.Sprintf("%s must not be started at boot and is enabled", want.Name), u.FileState, "disabled")
	}
	return toldDown
}

// enabledAtBoot follows `systemctl is-enabled`: what has no [Install] section of
// its own can not be enabled and is started by others. enabled-runtime, which
// that command accepts, ends with this boot.
func enabledAtBoot(fileState string) bool {
	return slices.Contains([]string{"enabled", "static", "alias", "indirect", "generated", "transient"}, fileState)
}

// broughtByPackage reports whether a required package is known to bring a unit.
func broughtByPackage(require Require, unit string) bool {
	return slices.ContainsFunc(require.Packages, func(p RequiredPackage) bool {
		c, ok := capabilityNamed(p.Name)
		if !ok {
			c, ok = capabilityOfPackage(p.Name)
		}
		return ok && slices.Contains(c.units, unit)
	})
}

// restartCount is NRestarts as it was first seen to have this value.
type restartCount struct {
	at time.Time
	n  int
}

// countRestarts adds what is seen now to what was seen before. The first entry
// of the result is the count at the beginning of the window, or when it was
// first looked at. systemd counts from 0 again once somebody starts the unit.
func countRestarts(seen []restartCount, now time.Time, n int, window time.Duration) []restartCount {
	if len(seen) > 0 {
		if last := seen[len(seen)-1]; n < last.n || now.Before(last.at) {
			seen = nil
		}
	}
	if len(seen) == 0 || seen[len(seen)-1].n != n {
		seen = append(slices.Clone(seen), restartCount{now, n})
	}
	for len(seen) > 1 && now.Sub(seen[1].at) > window {
		seen = seen[1:]
	}
	return seen
}

// judgeFiles holds require.files against what is on the host and returns how
// many apply to it. Contents never leave the host: a finding tells the line.
func judgeFiles(ctx context.Context, in Input, r *finding.Result) (n int, err error) {
	if len(in.Require.Files) == 0 {
		return 0, nil
	}
	os, err := in.Host.OS(ctx)
	if err != nil {
		return 0, fmt.Errorf("which files are required on this system: %w", err)
	}
	var errs []error
	for _, want := range in.Require.Files {
		if !want.AppliesTo(os) {
			continue
		}
		n++
		if err := judgeFile(ctx, in.Host, r, want); err != nil {
			errs = append(errs, fmt.Errorf("the required file %s: %w", want.Path, err))
		}
	}
	return n, errors.Join(errs...)
}

func judgeFile(ctx context.Context, v host.View, r *finding.Result, want RequiredFile) error {
	add := func(reason, message string, repair bool, observed, expected string) {
		f := finding.Finding{
			Reason: reason, Severity: finding.Warning, Subject: want.Path, Message: message,
			Evidence: []finding.Evidence{{Source: want.Path, Observed: observed, Expected: expected}},
		}
		if repair {
			f.Remedy = &finding.Remedy{Action: finding.WriteFile, Subject: want.Path}
		}
		r.Add(f)
	}
	notRegular := func(what string) {
		add("FileNotRegular", fmt.Sprintf("%s must be a plain file and is %s: it is left alone, and what it should configure may run with other settings", want.Path, what), false, what, "a regular file, reached through no symbolic link")
	}
	st, err := v.Lstat(ctx, want.Path)
	missing := errors.Is(err, fs.ErrNotExist)
	if err != nil && !missing {
		return err
	}
	if what := typeOfFile(st.Mode); !missing && what != "" {
		notRegular(what)
		return nil
	}
	if linked, err := linkedAbove(ctx, v, want.Path); err != nil {
		return err
	} else if linked != "" {
		notRegular("below " + linked + ", a symbolic link")
		return nil
	}
	if missing {
		add("FileMissing", want.Path+" is required on this host and missing: what reads it runs with other settings", true, "no such file", fmt.Sprintf("a file of %d bytes", len(want.Content)))
		return nil
	}
	if !want.OnlyIfMissing {
		data, err := v.ReadFileMax(ctx, want.Path, maxFileContent)
		switch {
		case errors.Is(err, host.ErrTooLarge):
			add("FileDiffers", want.Path+" has another content than the config gives: what reads it runs with other settings", true, fmt.Sprintf("%d bytes", st.Size), fmt.Sprintf("%d bytes", len(want.Content)))
		case errors.Is(err, fs.ErrNotExist), errors.Is(err, host.ErrNotRegular):
			return nil // replaced while it was looked at: the next pass tells
		case err != nil:
			return err
		case string(data) != want.Content:
			add("FileDiffers", want.Path+" has another content than the config gives: what reads it runs with other settings", true,
				fmt.Sprintf("%d bytes, other from line %d on", len(data), differsAt(data, []byte(want.Content))), fmt.Sprintf("%d bytes as in the config", len(want.Content)))
		}
	}
	return judgeAttributes(ctx, v, want, st, add)
}

func judgeAttributes(ctx context.Context, v host.View, want RequiredFile, st host.FileInfo, add func(reason, message string, repair bool, observed, expected string)) error {
	var observed, expected []string
	if want.Mode != "" {
		mode, err := strconv.ParseUint(want.Mode, 8, 32)
		if err != nil {
			return fmt.Errorf("mode %q: %w", want.Mode, err)
		}
		special := fs.ModeSetuid | fs.ModeSetgid | fs.ModeSticky
		if st.Mode.Perm() != fs.FileMode(mode) || st.Mode&special != 0 {
			observed = append(observed, "mode "+octal(st.Mode))
			expected = append(expected, "mode "+want.Mode)
		}
	}
	if want.Owner != "" {
		user, group, err := ownerIDs(ctx, v, want.Owner)
		if err != nil {
			return err
		}
		if st.UID != user || group != nil && st.GID != *group {
			observed = append(observed, fmt.Sprintf("owner %d:%d", st.UID, st.GID))
			expected = append(expected, "owner "+want.Owner)
		}
	}
	if len(observed) > 0 {
		add("FileModeWrong", want.Path+" has another mode or owner than the config gives: whoever must read it may not be able to, or others may change it", true, strings.Join(observed, ", "), strings.Join(expected, ", "))
	}
	return nil
}

// typeOfFile names what is no regular file, and is "" for one that is.
func typeOfFile(m fs.FileMode) string {
	switch {
	case m&fs.ModeSymlink != 0:
		return "a symbolic link"
	case m.IsDir():
		return "a directory"
	case !m.IsRegular():
		return "no file but a device, socket or pipe"
	}
	return ""
}

// linkedAbove returns the first directory above name that is a symbolic link.
// Directories that do not exist are none.
func linkedAbove(ctx context.Context, v host.View, name string) (string, error) {
	dir := path.Dir(name)
	real, err := v.RealPath(ctx, dir)
	switch {
	case err == nil && real == dir:
		return "", nil
	case err != nil && !errors.Is(err, fs.ErrNotExist):
		return "", err
	}
	at := ""
	for part := range strings.SplitSeq(strings.TrimPrefix(dir, "/"), "/") {
		at += "/" + part
		st, err := v.Lstat(ctx, at)
		if errors.Is(err, fs.ErrNotExist) {
			return "", nil
		}
		if err != nil {
			return "", err
		}
		if st.Mode&fs.ModeSymlink != 0 {
			return at, nil
		}
	}
	return "", nil
}

// octal is the mode as chmod takes it.
func octal(m fs.FileMode) string {
	n := uint32(m.Perm())
	for bit, v := range map[fs.FileMode]uint32{fs.ModeSetuid: 0o4000, fs.ModeSetgid: 0o2000, fs.ModeSticky: 0o1000} {
		if m&bit != 0 {
			n |= v
		}
	}
	return fmt.Sprintf("%04o", n)
}

// differsAt is the first line, from 1, in which two texts differ.
func differsAt(a, b []byte) int {
	i := 0
	for i < len(a) && i < len(b) && a[i] == b[i] {
		i++
	}
	return 1 + bytes.Count(a[:i], []byte("\n"))
}

// ownerIDs resolves "user" or "user:group" on the host. Numbers stand for
// themselves; names are looked up in the host's files only.
func ownerIDs(ctx context.Context, v host.Files, owner string) (user uint32, group *uint32, err error) {
	name, groupName, hasGroup := strings.Cut(owner, ":")
	if user, err = nameID(ctx, v, "/etc/passwd", name); err != nil || !hasGroup {
		return user, nil, err
	}
	id, err := nameID(ctx, v, "/etc/group", groupName)
	return user, &id, err
}

func nameID(ctx context.Context, v host.Files, file, name string) (uint32, error) {
	if name == "root" {
		return 0, nil
	}
	if id, err := strconv.ParseUint(name, 10, 32); err == nil {
		return uint32(id), nil
	}
	data, err := v.ReadFileMax(ctx, file, 4<<20)
	if err != nil {
		return 0, fmt.Errorf("who %s is: %w", name, err)
	}
	id, ok := parseNameID(data, name)
	if !ok {
		return 0, fmt.Errorf("there is no %s in %s", name, file)
	}
	return id, nil
}

// parseNameID finds the number of a name in passwd(5) or group(5): both begin
// NAME:PASSWORD:NUMBER.
func parseNameID(data []byte, name string) (uint32, bool) {
	for line := range bytes.Lines(data) {
		rest, ok := bytes.CutPrefix(line, []byte(name+":"))
		if !ok {
			continue
		}
		fields := bytes.SplitN(rest, []byte(":"), 3)
		if len(fields) < 2 {
			continue
		}
		if id, err := strconv.ParseUint(string(bytes.TrimSpace(fields[1])), 10, 32); err == nil {
			return uint32(id), true
		}
	}
	return 0, false
}
