package probes

import (
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/hosthygiene/agent/pkg/finding"
)

const reasonsFile = "../../docs/reasons.md"

// TestReasons keeps docs/reasons.md in step with the rules; -update writes it.
func TestReasons(t *testing.T) {
	got := reasonsDocument()
	if *update {
		if err := os.WriteFile(reasonsFile, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	want, err := os.ReadFile(reasonsFile)
	if err != nil {
		t.Fatal(err)
	}
	if d := cmp.Diff(string(want), got); d != "" {
		t.Errorf("docs/reasons.md is not what the rules say; make generate (-file +rules)\n%s", d)
	}
}

func reasonsDocument() string {
	var b strings.Builder
	b.WriteString(`# Reasons

Every reason the agent can give, by probe. A finding of severity *warning* or
*critical* makes its probe's condition True; *info* is shown and counts for
nothing. Severities and holds can be changed in the config (` + "`severity:`, `hold:`" + `).

*Hold* is how long a problem lasts before it is told, and how long it is gone
before it is cleared. This file is generated from the rules in pkg/probes.
`)
	for _, p := range Defaults().List() {
		fmt.Fprintf(&b, "\n## %s\n\nCondition `%s`.\n", p.Name(), p.Condition())
		for _, r := range p.Rules() {
			severities := []string{string(r.Severity)}
			for _, s := range r.Also {
				severities = append(severities, string(s))
			}
			fmt.Fprintf(&b, "\n### %s\n\n%s\n\n- severity: %s", r.Reason, r.Means, strings.Join(severities, " or "))
			if r.NeverReady {
				b.WriteString(", never against `hosthygiene.io/Ready`")
			}
			fmt.Fprintf(&b, "\n- what to do: %s More in the [runbook](runbooks/%s.md).\n", strings.TrimSuffix(r.Do, ".")+".", r.Reason)
			if r.HoldWhy != "" {
				fmt.Fprintf(&b, "- hold: %s before it is told, %s before it is cleared: %s\n",
					Duration(r.HoldBefore), Duration(r.HoldClear), r.HoldWhy)
			}
		}
	}
	return b.String()
}

// Every rule is complete, and every reason of the documented surface exists.
func TestRules(t *testing.T) {
	surface := map[string]string{
		"time":      "ClockUnsynchronized c, ClockOffsetHigh wc, ClockErrorBoundHigh w, NoTimeDaemon w, TimeDaemonConflict w, TimeSourceUnreachable w, TimeDaemonLocalReference w, ClockDisagreesWithHypervisor w, TimeDaemonUnresponsive w",
		"disks":     "RequiredDeviceMissing c, RequiredDeviceNotMounted c, MountedDeviceGone c, FilesystemReadOnly c, FilesystemErrors w, MountSourceStale w, UnstableDeviceName w, DuplicateDeviceID c, DeviceOffline cw, DeviceMissingFromArray w, ThinPoolNearFull wc, MountUnresponsive wc, LeftoverDevice w",
		"multipath": "AllPathsFailed c, PathsDegraded w, QueueingWithoutPaths c, MultipathdDown c, MultipathdUnresponsive w, MapSuspended c, UnwantedMap w, PathsNotMultipathed w, MultipathSettingMismatch w",
		"iscsi":     "IscsidDown c, IscsidUnavailable c, SessionFailed cw, InitiatorNameMissing c, InitiatorNameInvalid c, InitiatorNameNotGenerated w, InitiatorNameChanged w, RecoveryTimeoutHigh w, KernelModuleMissing c, AutomaticLogin i",
		"pids":      "PIDsNearLimit wc, NoPIDReservation w, PIDReservationTooSmall w, PIDLimitStale w, PodPIDsUnlimited i, ForkFailures w",
		"oom":       "OOMScoreDrift w, ProtectedProcessFirst c, SystemOOMKill w, ContainerOOMKills i",
		"packages":  "PackageMissing c, PackageManagerBroken c, PackageLockHeld w",
		"units":     "RequiredUnitMissing c, RequiredUnitNotActive c, RequiredUnitMasked cw, RequiredUnitNotEnabled w, UnwantedUnitActive w, UnwantedUnitEnabled w, UnitFailed w, UnitRestarting w, FileMissing w, FileDiffers w, FileModeWrong w, FileNotRegular w",
		"kernel":    "ModuleNotLoaded c, ModuleUnavailable c, ModuleBlacklisted cw, ModuleNotPersisted w, SysctlDiffers w, SysctlUnavailable w, SysctlNotPersisted w",
		"updates":   "UpdatesNotConfigured i, UpdatesNotRunning w, UpdatesFailing w, RebootPending wi, KernelOutdated wi, RebootConflict w",
		"kubelet":   "KubeletFlagRemoved wc, KubeletFlagDeprecated i, FeatureGateRemoved wci, FeatureGateLocked wc, SwapEnabled wc, NoPIDEviction wi, NoReservations w, CgroupDriverMismatch ci, CgroupV1 wi, CertificateExpiring wc, KubeletSkew ci, OrphanedCondition i, DeprecatedLabels i",
	}
	letters := map[finding.Severity]byte{finding.Info: 'i', finding.Warning: 'w', finding.Critical: 'c'}
	seen := map[string]bool{}
	for _, p := range Defaults().List() {
		have := map[string]string{}
		for _, r := range p.Rules() {
			if r.Reason == "" || r.Means == "" || r.Do == "" || r.Severity.Rank() == 0 && r.Severity != finding.Info {
				t.Errorf("%s: %+v is incomplete", p.Name(), r)
			}
			if (r.HoldBefore > 0 || r.HoldClear > 0) && r.HoldWhy == "" {
				t.Errorf("%s: a hold without its reason", r.Reason)
			}
			if seen[r.Reason] {
				t.Errorf("%s is declared twice", r.Reason)
			}
			seen[r.Reason] = true
			s := string(letters[r.Severity])
			for _, also := range r.Also {
				s += string(letters[also])
			}
			have[r.Reason] = s
		}
		for _, entry := range strings.Split(surface[p.Name()], ", ") {
			reason, want, _ := strings.Cut(entry, " ")
			// A probe may know milder cases besides; what is documented stays.
			if !strings.HasPrefix(have[reason], want[:1]) || strings.Trim(want, have[reason]) != "" {
				t.Errorf("%s %s: severities %q, want %q", p.Name(), reason, have[reason], want)
			}
		}
	}
}
