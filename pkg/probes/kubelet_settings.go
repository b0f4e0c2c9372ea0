package probes

import (
	"bytes"
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// KubeletSettings checks the kubelet's own settings: those that harm the node now
// and those with which the kubelet does not start after the next upgrade.
type KubeletSettings struct {
	Common
	// CertificateExpiry is how long before its end a certificate is told of.
	CertificateExpiry Duration `json:"certificateExpiry,omitempty"`
}

// DefaultKubeletSettings returns the default settings.
func DefaultKubeletSettings() KubeletSettings {
	return KubeletSettings{CertificateExpiry: Duration(30 * 24 * time.Hour)}
}

// Rarely implements [Probe].
func (KubeletSettings) Rarely() bool { return true }

// Name implements [Probe].
func (KubeletSettings) Name() string { return "kubelet" }

// Condition implements [Probe].
func (KubeletSettings) Condition() string { return ConditionPrefix + "KubeletProblem" }

// Wakes implements [Probe]. Where the configuration and the certificates lie is
// known after a look.
func (KubeletSettings) Wakes(Require) Wakes {
	return Wakes{
		Units:     []string{kubeletUnit},
		Files:     followed(kubeletFlagFiles...),
		Processes: []string{"kubelet"},
		// Who writes the configuration over empties the file first, as kubeadm does,
		// and a kubelet with an empty one has other settings.
		After: 500 * time.Millisecond,
		// The kubelet answers some seconds after it starts.
		Again: 10 * time.Second,
	}
}

// Validate implements [Probe].
func (p KubeletSettings) Validate() error { return positive("certificateExpiry", p.CertificateExpiry) }

const kubeletUnit = "kubelet.service"

// kubeletFlagFiles are where packages and kubeadm keep flags for the unit.
var kubeletFlagFiles = []string{"/var/lib/kubelet/kubeadm-flags.env", "/etc/default/kubelet", "/etc/sysconfig/kubelet"}

// Rules implements [Probe].
func (KubeletSettings) Rules() []finding.Rule {
	const restarts = "while the kubelet restarts its settings can not be judged"
	return []finding.Rule{{
		Reason: "KubeletFlagRemoved", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
		Means:     "The kubelet has a command-line flag that the next minor version does not know: upgraded to it, the kubelet does not start. Critical when the kubelet is down and the flag is why.",
		Do:        "Remove the flag before the upgrade, from the unit's drop-in or the file that the evidence names (/var/lib/kubelet/kubeadm-flags.env, /etc/default/kubelet, /etc/sysconfig/kubelet); what it did may be a field of the configuration file now.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "KubeletFlagDeprecated", Severity: finding.Info,
		Means:     "The kubelet has a command-line flag that is deprecated, or that a later version than the next does not know. Flags that merely have a field in the configuration file are not told of.",
		Do:        "Remove the flag when convenient; the evidence has what kubernetes says about it.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "FeatureGateRemoved", Severity: finding.Warning, Also: []finding.Severity{finding.Critical, finding.Info},
		Means:     "The kubelet's configuration sets a feature gate that the next minor version does not know: upgraded to it, the kubelet does not start. Critical when the kubelet is down and the gate is why; information when the gate goes in a later version than the next.",
		Do:        "Remove the gate from featureGates, or from --feature-gates.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "FeatureGateLocked", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
		Means:     "The kubelet's configuration sets a feature gate to what the next minor version refuses, for the feature is settled there: upgraded to it, the kubelet does not start. Critical when the kubelet is down and the gate is why.",
		Do:        "Remove the gate from featureGates, or from --feature-gates, and see that the node does well without.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "SwapEnabled", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
		Means:     "The host swaps and the kubelet's settings do not go with it: with failSwapOn it will not start again, and a swapBehavior its version does not know is refused. Critical when the kubelet is down.",
		Do:        "swapoff -a and remove the swap from fstab (zram counts as well), or set failSwapOn: false with memorySwap.swapBehavior.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "NoPIDEviction", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
		Means:      "No eviction threshold is on pid.available, so that the kubelet does not end the pod that takes all process IDs. Information where pods have a limit of their own or the host a reservation, which hold without.",
		Do:         "Add pid.available (for example \"5%\") to evictionHard; a list there replaces the defaults, so keep memory.available, nodefs.available, nodefs.inodesFree and imagefs.available.",
		HoldBefore: halfWritten, HoldClear: kubeletRestart, HoldWhy: writtenInPlace + "; " + restarts,
	}, {
		Reason: "NoReservations", Severity: finding.Warning,
		Means:      "Neither systemReserved nor kubeReserved keeps memory from pods: full of pods, the node's daemons and the kubelet compete with them, and the kernel's OOM killer decides.",
		Do:         "Set systemReserved and kubeReserved with memory (and cpu, ephemeral-storage) in the kubelet's configuration and restart it. For process IDs see NoPIDReservation.",
		HoldBefore: halfWritten, HoldClear: kubeletRestart, HoldWhy: writtenInPlace + "; " + restarts,
	}, {
		Reason: "CgroupDriverMismatch", Severity: finding.Critical, Also: []finding.Severity{finding.Info},
		Means:      "The kubelet and the container runtime manage control groups by different drivers: containers run outside the groups of their pods, without the pods' limits. Information where both use cgroupfs on a host whose init is systemd, so that two managers write one tree.",
		Do:         "Set the same driver for both, systemd where it is the init: cgroupDriver in the kubelet's configuration, SystemdCgroup in containerd's, cgroup_manager in CRI-O's. Drain the node first: pods must be created anew.",
		HoldBefore: kubeletRestart, HoldWhy: "the groups of an old driver are there until its last container has ended",
		HoldClear: kubeletRestart,
	}, {
		Reason: "CgroupV1", Severity: finding.Warning, Also: []finding.Severity{finding.Info},
		Means:     "The host uses cgroup v1: a kubelet of version 1.35 or later does not start on it unless failCgroupV1 is false, and support ends. Information while the next version is before 1.35.",
		Do:        "Boot with cgroup v2 (systemd.unified_cgroup_hierarchy=1), which takes a kernel of 5.8 or later and a runtime that knows it.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "CertificateExpiring", Severity: finding.Warning, Also: []finding.Severity{finding.Critical},
		Means:     "A certificate of the kubelet nears its end and was not renewed. Without its client certificate the node is NotReady, without its serving certificate logs, exec and metrics fail where it is verified. Critical in the last tenth of probes.kubelet.certificateExpiry, and when it has ended; never for a self-signed serving certificate, which nothing verifies.",
		Do:        "Look at `kubectl get csr`: a request that nobody approves is the usual cause. A self-signed kubelet.crt is made anew when it is deleted and the kubelet restarted.",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "KubeletSkew", Severity: finding.Critical, Also: []finding.Severity{finding.Info},
		Means:     "The kubelet's version does not go with the API server's: it may be up to three minor versions older (two before 1.25), and not newer. Information at the limit: the control plane's next upgrade exceeds it.",
		Do:        "Upgrade the older of the two. https://kubernetes.io/releases/version-skew-policy/",
		HoldClear: kubeletRestart, HoldWhy: restarts,
	}, {
		Reason: "OrphanedCondition", Severity: finding.Info,
		Means: "The Node has a condition that nothing keeps up to date: one that the kubelet has not written for many versions, or one that nobody has confirmed for a week. What it says is history, and tools may act on it.",
		Do:    "Find who wrote it; when it is gone for good, remove the condition with a patch of nodes/status. The agent leaves conditions of others alone.",
	}, {
		Reason: "DeprecatedLabels", Severity: finding.Info,
		Means: "Pods on this node select nodes by a deprecated beta label. When it is no longer set, they do not schedule.",
		Do:    "Use kubernetes.io/os, kubernetes.io/arch, node.kubernetes.io/instance-type, topology.kubernetes.io/zone and topology.kubernetes.io/region in nodeSelector and affinity.",
	}}
}

// Check implements [Probe].
func (p KubeletSettings) Check(ctx context.Context, in Input) (finding.Result, error) {
	c := kubeletPass{KubeletSettings: p, Input: in, ctx: ctx}
	c.run()
	return c.r, errors.Join(c.errs...)
}

// kubeletPass is one pass.
type kubeletPass struct {
	KubeletSettings
	Input
	ctx  context.Context
	r    finding.Result
	errs []error

	// version is the kubelet's, minor its N of 1.N; 0 when it is not known.
	version string
	minor   int
	// untold: the cluster knows the version and has not said it yet.
	untold bool
	// down: it should run and does not.
	down bool
	// again is how long a question to it that drew an error is not put again.
	again time.Duration
	facts []string
}

func (c *kubeletPass) fail(format string, args ...any) {
	c.errs = append(c.errs, fmt.Errorf(format, args...))
}

func (c *kubeletPass) run() {
	k, runs, err := findKubelet(c.ctx, c.Input)
	if err != nil {
		c.errs = append(c.errs, err)
	}
	var node Node
	inCluster := false
	if c.Cluster != nil {
		node, inCluster = c.Cluster.Node()
	}
	c.findVersion(node)
	c.again = c.askAgain(k)
	if !runs {
		if !c.stopped(err) {
			return
		}
		k = Kubelet{Program: "kubelet", RootDir: "/var/lib/kubelet", Flags: c.startFlags()}
		if dir := k.Flags.Last("root-dir"); path.IsAbs(dir) {
			k.RootDir = path.Clean(dir)
		}
	}
	config, known := c.config(k, runs)
	c.checkFlags(k)
	if known {
		c.checkGates(config)
		c.checkSwap(config)
		c.checkReservations(config)
	}
	c.checkCgroups(config, known, runs)
	c.checkCertificates(k, config, known)
	if inCluster {
		c.checkSkew()
		c.checkConditions(node)
	}
	if runs {
		c.checkSelectors()
	}
	c.r.Follow = append(c.r.Follow, k.configFiles(c.ctx, c.Host)...)
	what := "kubelet"
	if k.Program != "kubelet" {
		what += " in " + k.Program
	}
	if c.version != "" {
		what += " " + c.version
	} else {
		what += ", whose version is not known here"
	}
	if newest := newestKubelet(); c.minor >= newest {
		c.facts = append(c.facts, fmt.Sprintf("what goes after 1.%d is not known to this agent", newest))
	}
	if !inCluster {
		c.facts = append(c.facts, "what only the cluster knows is not looked at")
	}
	c.r.Summary = strings.Join(append([]string{what}, c.facts...), "; ")
}

// stopped tells a host whose kubelet should run from one that has none.
func (c *kubeletPass) stopped(err error) bool {
	units, uerr := c.Host.Units(c.ctx, kubeletUnit)
	switch {
	case errors.Is(uerr, host.ErrNoSystemd) || errors.Is(uerr, host.ErrNotLive):
	case uerr != nil:
		c.fail("%s: %w", kubeletUnit, uerr)
	case units[0].Load == "loaded" && (units[0].Active != "inactive" || enabledAtBoot(units[0].FileState)):
		// A kubelet that ends at once is "activating" (auto-restart) in between.
		c.down = units[0].Active == "failed" || units[0].Sub == "auto-restart"
		return true
	}
	c.r.NotApplicable = err == nil && len(c.errs) == 0
	c.r.Summary = "no kubelet runs here"
	return false
}

// findVersion: the Node says what the kubelet said when it started. Without a
// cluster dpkg's database may know; running the program is no reading.
func (c *kubeletPass) findVersion(node Node) {
	c.version = node.KubeletVersion
	if c.Cluster == nil {
		db, err := readDpkg(c.ctx, c.Input, []string{"kubelet"})
		if err == nil {
			if pkg, ok := db.find("kubelet"); ok && pkg.installed() {
				version, _, _ := strings.Cut(pkg.version, "-")
				c.version = "v" + version
			}
		}
	}
	if c.minor = minorVersion(c.version); c.minor == 0 {
		c.version, c.untold = "", c.Cluster != nil
	}
}

// startFlags are the flags a kubelet that does not run is started with, as far
// as they stand in its unit and in the files for them.
func (c *kubeletPass) startFlags() KubeletFlags {
	names := slices.Clone(kubeletFlagFiles)
	for _, dir := range []string{"/usr/lib/systemd/system", "/lib/systemd/system", "/etc/systemd/system"} {
		names = append(names, dir+"/"+kubeletUnit)
		drop, err := ls(c.ctx, c.Host, dir+"/"+kubeletUnit+".d", "")
		if err != nil {
			c.fail("flags of the kubelet: %w", err)
		}
		names = append(names, drop...)
	}
	argv := []string{"kubelet"}
	for _, name := range names {
		data, err := c.Host.ReadFileMax(c.ctx, name, maxCmdline)
		if err != nil {
			if !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, host.ErrNotRegular) {
				c.fail("flags of the kubelet: %w", err)
			}
			continue
		}
		argv = append(argv, flagWords(data)...)
	}
	return parseKubeletFlags(argv)
}

// flagWords finds the flags in a unit or a file of variables for it, in order:
// words that begin with "--", and the word behind one without '='.
func flagWords(data []byte) []string {
	var words []string
	for line := range strings.Lines(string(data)) {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' || line[0] == ';' {
			continue
		}
		open := false
		for _, word := range strings.FieldsFunc(line, func(r rune) bool { return r <= ' ' || r == '"' || r == '\'' || r == '\\' }) {
			switch at := strings.Index(word, "--"); {
			case at == 0 || at > 0 && word[at-1] == '=': // KUBELET_ARGS=--x=y
				word = word[at:]
				words = append(words, word)
				open = !strings.Contains(word, "=")
			case open && word[0] != '$':
				words = append(words, word)
				open = false
			}
		}
	}
	return words
}

// askAgain is how long a question that drew an error is not put again, so that
// what does not answer is not asked every minute.
const askAgain = 5 * time.Minute

// askAgain is 0 for a kubelet that has just started: it answers in a moment, and
// until then nothing can be said of it.
func (c *kubeletPass) askAgain(k Kubelet) time.Duration {
	os, err := c.Host.OS(c.ctx)
	if err != nil || os.BootTime.IsZero() || k.PID == 0 {
		return askAgain // only how often is decided here
	}
	started := os.BootTime.Add(time.Duration(k.StartTicks) * (time.Second / userHZ))
	if !elapsed(c.Now, started, kubeletRestart) {
		return 0
	}
	return askAgain
}

// config is what the kubelet would start with now, for that is what an upgrade
// meets; where its files can not be seen, what the running one has.
func (c *kubeletPass) config(k Kubelet, runs bool) (KubeletConfig, bool) {
	config, err := k.configOnRestart(c.ctx, c.Input)
	if err == nil {
		return config, true
	}
	if !runs {
		c.errs = append(c.errs, err)
		return KubeletConfig{}, false
	}
	live, liveErr := k.runningConfig(c.ctx, c.Input, c.again)
	if liveErr == nil {
		return live, true
	}
	c.errs = append(c.errs, err)
	if !errors.Is(liveErr, host.ErrNotConfigured) {
		c.errs = append(c.errs, liveErr)
	}
	return KubeletConfig{}, false
}

// soon reports whether what goes in a minor version meets the next upgrade. A
// kubelet that is down may be that of the next version already, and where nothing
// will say the version, any upgrade may be the one.
func (c *kubeletPass) soon(minor int) bool {
	return minor > 0 && !c.untold && (c.minor == 0 || minor <= c.minor+1)
}

func (c *kubeletPass) severity() finding.Severity {
	if c.down {
		return finding.Critical
	}
	return finding.Warning
}

// consequence of what the next version refuses.
func (c *kubeletPass) consequence(minor int) string {
	if c.down {
		return "the kubelet is down, and from that version on this is why"
	}
	if c.minor == 0 {
		return fmt.Sprintf("upgraded to 1.%d or later, the kubelet does not start", minor)
	}
	return fmt.Sprintf("upgraded to 1.%d, the kubelet does not start", max(minor, c.minor+1))
}

func (c *kubeletPass) checkFlags(k Kubelet) {
	if k.FlagsUnseen != "" {
		c.facts = append(c.facts, "flags not seen: "+k.FlagsUnseen)
		return
	}
	for _, name := range slices.Sorted(maps.Keys(k.Flags)) {
		h, ok := flagHistory(name)
		if !ok {
			continue
		}
		e := finding.Evidence{Source: "flags of the kubelet", Observed: "--" + name}
		if !c.down {
			e.Source = procFile(k.PID, "cmdline")
		}
		says := ""
		if h.says != "" {
			says = "; kubernetes says: " + h.says
		}
		if c.soon(h.removed) {
			e.Expected = fmt.Sprintf("not there from 1.%d on%s", h.removed, says)
			c.r.Add(finding.Finding{
				Reason: "KubeletFlagRemoved", Severity: c.severity(), Subject: "--" + name,
				Message:  fmt.Sprintf("the kubelet has the flag --%s, which 1.%d does not know: %s", name, h.removed, c.consequence(h.removed)),
				Evidence: []finding.Evidence{e},
			})
			continue
		}
		if h.deprecated > 0 && c.minor > 0 && h.deprecated > c.minor {
			continue // not yet
		}
		message := fmt.Sprintf("the kubelet has the deprecated flag --%s", name)
		if h.removed > 0 {
			message = fmt.Sprintf("the kubelet has the flag --%s, which 1.%d does not know", name, h.removed)
		}
		e.Expected = "not there" + says
		c.r.Add(finding.Finding{Reason: "KubeletFlagDeprecated", Severity: finding.Info, Subject: "--" + name, Message: message, Evidence: []finding.Evidence{e}})
	}
}

func (c *kubeletPass) checkGates(config KubeletConfig) {
	for _, name := range slices.Sorted(maps.Keys(config.FeatureGates)) {
		h, ok := gateHistory(name)
		if !ok {
			continue
		}
		value := config.FeatureGates[name]
		e := finding.Evidence{Source: config.Source, Observed: fmt.Sprintf("%s: %t", name, value)}
		switch {
		case c.soon(h.removed):
			e.Expected = fmt.Sprintf("not set from 1.%d on", h.removed)
			c.r.Add(finding.Finding{
				Reason: "FeatureGateRemoved", Severity: c.severity(), Subject: name,
				Message:  fmt.Sprintf("the kubelet's configuration sets the feature gate %s, which 1.%d does not know: %s", name, h.removed, c.consequence(h.removed)),
				Evidence: []finding.Evidence{e},
			})
		case c.soon(h.locked) && value != h.lockedTo:
			e.Expected = fmt.Sprintf("%t, or not set, from 1.%d on", h.lockedTo, h.locked)
			c.r.Add(finding.Finding{
				Reason: "FeatureGateLocked", Severity: c.severity(), Subject: name,
				Message:  fmt.Sprintf("the kubelet's configuration sets the feature gate %s to %t, which 1.%d refuses: %s", name, value, h.locked, c.consequence(h.locked)),
				Evidence: []finding.Evidence{e},
			})
		case h.removed > 0:
			e.Expected = fmt.Sprintf("not set from 1.%d on", h.removed)
			c.r.Add(finding.Finding{
				Reason: "FeatureGateRemoved", Severity: finding.Info, Subject: name,
				Message:  fmt.Sprintf("the kubelet's configuration sets the feature gate %s, which 1.%d does not know", name, h.removed),
				Evidence: []finding.Evidence{e},
			})
		}
	}
}

// noUnlimitedSwap is the first version that refuses swapBehavior UnlimitedSwap
// (kubernetes pkg/kubelet/apis/config/validation).
const noUnlimitedSwap = 30

func (c *kubeletPass) checkSwap(config KubeletConfig) {
	if config.SwapBehavior == "UnlimitedSwap" && c.soon(noUnlimitedSwap) {
		c.r.Add(finding.Finding{
			Reason: "SwapEnabled", Severity: c.severity(), Subject: "swapBehavior",
			Message:  fmt.Sprintf("the kubelet's swapBehavior is UnlimitedSwap, which 1.%d refuses: %s", noUnlimitedSwap, c.consequence(noUnlimitedSwap)),
			Evidence: []finding.Evidence{{Source: config.Source, Observed: "memorySwap.swapBehavior: UnlimitedSwap", Expected: "NoSwap or LimitedSwap"}},
		})
	}
	if !config.FailSwapOn {
		return
	}
	data, err := c.Host.ReadFile(c.ctx, "/proc/swaps")
	if errors.Is(err, fs.ErrNotExist) { // a kernel without swap
		return
	}
	if err != nil {
		c.fail("swap: %w", err)
		return
	}
	names := parseSwaps(data)
	if len(names) == 0 {
		return
	}
	message := "the host swaps and failSwapOn is set: the kubelet does not start again after it stops"
	if c.down {
		message = "the host swaps and failSwapOn is set: the kubelet does not start"
	}
	c.r.Add(finding.Finding{
		Reason: "SwapEnabled", Severity: c.severity(), Message: message,
		Evidence: []finding.Evidence{
			{Source: "/proc/swaps", Observed: list(names, 5), Expected: "none"},
			{Source: config.Source, Observed: "failSwapOn: true"},
		},
	})
}

// parseSwaps returns the devices and files of proc_swaps(5). The kubelet counts
// every line below the head (kubernetes pkg/kubelet/util/swap).
func parseSwaps(data []byte) []string {
	var names []string
	head := true
	for line := range bytes.Lines(data) {
		fields := bytes.Fields(line)
		if !head && len(fields) > 0 {
			names = append(names, truncate(fields[0], 100))
		}
		head = false
	}
	return names
}

func (c *kubeletPass) checkReservations(config KubeletConfig) {
	if !config.EvictsForPIDs {
		severity, why := finding.Warning, "nothing holds a pod that takes all process IDs"
		switch {
		case config.ReservedPIDs() > 0 && config.EnforcePods:
			severity, why = finding.Info, "pods can take those of other pods, not the host's"
		case config.PodPIDsLimit > 0:
			severity, why = finding.Info, "what holds a pod is its own limit"
		}
		c.r.Add(finding.Finding{
			Reason: "NoPIDEviction", Severity: severity,
			Message:  "the kubelet evicts no pod when process IDs run out: " + why,
			Evidence: []finding.Evidence{{Source: config.Source, Observed: "no pid.available in evictionHard or evictionSoft", Expected: "pid.available, for example 5%"}},
		})
	}
	if !config.ReservesMemory {
		c.r.Add(finding.Finding{
			Reason: "NoReservations", Severity: finding.Warning,
			Message:  "no memory is kept from pods for the host and the kubelet",
			Evidence: []finding.Evidence{{Source: config.Source, Observed: "no memory in systemReserved or kubeReserved", Expected: "memory, for example 500Mi each"}},
		})
	}
}

// noCgroupV1 is the first version in which failCgroupV1 is true when it is not
// set (kubernetes pkg/kubelet/apis/config/v1beta1/defaults.go).
const noCgroupV1 = 35

func (c *kubeletPass) checkCgroups(config KubeletConfig, known, runs bool) {
	tree, err := openCgroups(c.ctx, c.Host)
	if err != nil {
		c.fail("control groups: %w", err)
		return
	}
	if !tree.unified {
		f := finding.Finding{
			Reason: "CgroupV1", Severity: finding.Warning,
			Message:  "the host uses cgroup v1, which kubernetes gives up",
			Evidence: []finding.Evidence{{Source: cgroupRoot + "/cgroup.controllers", Observed: "not there", Expected: "cgroup v2"}},
		}
		switch {
		case known && config.AllowsCgroupV1:
			f.Evidence = append(f.Evidence, finding.Evidence{Source: config.Source, Observed: "failCgroupV1: false"})
		case !c.soon(noCgroupV1):
			f.Severity = finding.Info
		default:
			f.Message = fmt.Sprintf("the host uses cgroup v1, on which a kubelet of 1.%d or later does not start", noCgroupV1)
		}
		c.r.Add(f)
	}
	if !runs || known && !config.CgroupsPerQOS {
		return
	}
	c.checkDriver(tree, config)
}

// checkDriver looks for containers outside kubepods. A runtime with the cgroupfs
// driver takes what a kubelet with systemd's gives it, "SLICE:cri-containerd:ID",
// for a path, which runc makes beside or below its own group, or in the root.
func (c *kubeletPass) checkDriver(tree cgroupTree, config KubeletConfig) {
	dirs := []string{"/"}
	runtimes, err := processesNamed(c.ctx, c.Host, isRuntime, false)
	if err != nil {
		c.fail("process table: %w", err)
		return
	}
	for _, p := range runtimes {
		data, err := c.Host.ReadFile(c.ctx, procFile(p.PID, "cgroup"))
		if err != nil {
			continue // it has ended
		}
		if name := path.Clean("/" + parseProcCgroup(data).pids); parsePodCgroup(name).UID == "" {
			dirs = append(dirs, name, path.Dir(name))
		}
	}
	slices.Sort(dirs)
	for _, dir := range slices.Compact(dirs) {
		file := strings.TrimSuffix(tree.file(dir, "pids"), "/pids")
		names, err := c.Host.ReadDir(c.ctx, file)
		if err != nil {
			if !isGone(err) {
				c.fail("control groups: %w", err)
			}
			continue
		}
		at := slices.IndexFunc(names, func(n string) bool {
			slice, _, ok := strings.Cut(n, ":")
			return ok && strings.HasSuffix(slice, ".slice") && strings.Contains(slice, "kubepods")
		})
		if at < 0 {
			continue
		}
		c.r.Add(finding.Finding{
			Reason: "CgroupDriverMismatch", Severity: finding.Critical,
			Message:  "the kubelet uses systemd's driver of control groups and the container runtime cgroupfs: containers run outside their pods' groups, without the pods' limits",
			Evidence: []finding.Evidence{{Source: file, Observed: truncate([]byte(names[at]), 120), Expected: "containers below kubepods.slice"}},
		})
		return
	}
	o, err := c.Host.OS(c.ctx)
	if err != nil || o.Init != "systemd" {
		return
	}
	group, err := tree.findKubepods(c.ctx, config, func() string { return "" })
	if err != nil {
		c.fail("control groups: %w", err)
		return
	}
	if group != "" && !strings.HasSuffix(group, ".slice") {
		c.r.Add(finding.Finding{
			Reason: "CgroupDriverMismatch", Severity: finding.Info,
			Message:  "the kubelet uses the cgroupfs driver on a host whose init is systemd: two managers write one tree of control groups",
			Evidence: []finding.Evidence{{Source: tree.file(group, "pids.current"), Observed: "kubepods", Expected: "kubepods.slice"}},
		})
	}
}

// keptCertificate is what was read of one state of a file.
type keptCertificate struct {
	id         fileID
	from, to   time.Time
	selfSigned bool
	err        error
}

func (c *kubeletPass) checkCertificates(k Kubelet, config KubeletConfig, known bool) {
	if k.OwnRoot {
		return
	}
	tlsCertFile := ""
	if known {
		tlsCertFile = config.TLSCertFile
	}
	serving := k.servingFiles(c.ctx, c.Host, tlsCertFile)
	ends := []string{}
	for _, of := range []struct {
		what  string
		files []string
	}{
		{"client", []string{k.certDir(c.ctx, c.Host) + "/kubelet-client-current.pem"}},
		{"serving", serving},
	} {
		for _, file := range of.files { // the first that is there is in use
			cert, ok := c.certificate(file)
			if !ok {
				continue
			}
			c.r.Follow = append(c.r.Follow, file)
			if cert.err != nil {
				c.fail("%s certificate of the kubelet: %s: %w", of.what, file, cert.err)
			} else {
				c.judgeCertificate(of.what, file, cert)
				ends = append(ends, fmt.Sprintf("%s certificate until %s", of.what, cert.to.UTC().Format(time.DateOnly)))
			}
			break
		}
	}
	if len(ends) > 0 {
		c.facts = append(c.facts, strings.Join(ends, ", "))
	}
}

// certificate reads the first certificate of a file; ok is false where there is
// no such file.
func (c *kubeletPass) certificate(file string) (keptCertificate, bool) {
	id, err := statID(c.ctx, c.Host, file)
	if isGone(err) {
		return keptCertificate{}, false
	}
	if err != nil {
		return keptCertificate{err: err}, true
	}
	if kept, ok := Kept[keptCertificate](c.Memory, "certificate "+file); ok && kept.id == id {
		return kept, true
	}
	kept := keptCertificate{id: id}
	ders, err := c.Host.Certificates(c.ctx, file)
	switch {
	case isGone(err):
		return keptCertificate{}, false
	case err != nil:
		kept.err = err
		return kept, true // asked again: it may be denied, or half written
	case len(ders) == 0:
		kept.err = errors.New("no certificate in it")
	default:
		cert, err := x509.ParseCertificate(ders[0])
		if err != nil {
			kept.err = errors.New("not a certificate")
			break
		}
		kept.from, kept.to = cert.NotBefore, cert.NotAfter
		// The kubelet's own is signed by a CA made for it alone, which comes along.
		kept.selfSigned = bytes.Equal(cert.RawIssuer, cert.RawSubject) || len(ders) > 1 && signedBy(cert, ders[1])
	}
	c.Memory.Keep("certificate "+file, kept)
	return kept, true
}

// signedBy recognises GenerateSelfSignedCertKey of k8s.io/client-go/util/cert: a
// CA with a fresh name, "HOST-ca@TIME", that signs itself and stands behind the
// certificate.
func signedBy(cert *x509.Certificate, der []byte) bool {
	ca, err := x509.ParseCertificate(der)
	return err == nil && bytes.Equal(ca.RawIssuer, ca.RawSubject) && bytes.Equal(cert.RawIssuer, ca.RawSubject) && strings.Contains(ca.Subject.CommonName, "-ca@")
}

func (c *kubeletPass) judgeCertificate(what, file string, cert keptCertificate) {
	c.r.Sample("hosthygiene_kubelet_certificate_expiry_timestamp_seconds", float64(cert.to.Unix()), "certificate", what)
	left := cert.to.Sub(c.Now)
	// The kubelet renews at 70 to 90 % of a certificate's life: a short-lived one
	// is not late a month before its end (client-go util/certificate).
	limit := min(c.CertificateExpiry.D(), cert.to.Sub(cert.from)/10)
	if left >= limit {
		return
	}
	f := finding.Finding{
		Reason: "CertificateExpiring", Severity: finding.Warning, Subject: what,
		Message:  fmt.Sprintf("the kubelet's %s certificate ends on %s and was not renewed", what, cert.to.UTC().Format(time.DateOnly)),
		Evidence: []finding.Evidence{{Source: file, Observed: "valid until " + cert.to.UTC().Format(time.RFC3339), Expected: "renewed " + age(limit) + " before that"}},
	}
	if left < 0 {
		f.Message = fmt.Sprintf("the kubelet's %s certificate ended on %s", what, cert.to.UTC().Format(time.DateOnly))
	}
	if left < limit/10 && !cert.selfSigned {
		f.Severity = finding.Critical
	}
	c.r.Add(f)
}

// serverVersion is the API server's version as it was last told, and whether the
// last question drew an error.
type serverVersion struct {
	version string
	err     error
	at      time.Time // of the error
}

func (c *kubeletPass) checkSkew() {
	if c.minor == 0 {
		return
	}
	// An answer is not kept for another pass: the cluster knows what may have
	// changed it.
	kept, _ := Kept[serverVersion](c.Memory, "server")
	if kept.err == nil || elapsed(c.Now, kept.at, askAgain) {
		version, err := c.Cluster.Version(c.ctx)
		if err == nil && minorVersion(version) == 0 {
			err = fmt.Errorf("%.60q is no version of kubernetes", version)
		}
		if err != nil && kept.version != "" { // the last one is as good for a while
			version = kept.version
		}
		kept = serverVersion{version: version, err: err, at: c.Now}
		c.Memory.Keep("server", kept)
	}
	server := minorVersion(kept.version)
	if server == 0 {
		c.fail("version of the API server: %w", kept.err)
		return
	}
	c.facts = append(c.facts, "API server "+kept.version)
	allowed := 3
	if c.minor < 25 {
		allowed = 2
	}
	f := finding.Finding{
		Reason: "KubeletSkew", Severity: finding.Critical,
		Evidence: []finding.Evidence{
			{Source: "nodeInfo of the Node", Observed: "kubelet " + c.version, Expected: fmt.Sprintf("1.%d to 1.%d", server-allowed, server)},
			{Source: "API server, /version", Observed: kept.version},
		},
	}
	switch behind := server - c.minor; {
	case behind < 0:
		f.Message = fmt.Sprintf("the kubelet %s is newer than the API server %s, which is not supported", c.version, kept.version)
	case behind > allowed:
		f.Message = fmt.Sprintf("the kubelet %s is %d minor versions older than the API server %s; %d are supported", c.version, behind, kept.version, allowed)
	case behind == allowed:
		f.Severity = finding.Info
		f.Message = fmt.Sprintf("the kubelet %s is as old as the API server %s allows: it comes first in the next upgrade", c.version, kept.version)
	default:
		return
	}
	c.r.Add(f)
}

// pastConditions are those the kubelet wrote once: OutOfDisk until 1.12
// (RemoveOutOfDiskCondition in kubernetes 1.14, pkg/kubelet/nodestatus),
// KubeletConfigOk for dynamic configuration until 1.23.
var pastConditions = map[string]string{"OutOfDisk": "1.12", "KubeletConfigOk": "1.23", "ConfigOK": "1.10"}

// staleCondition is how long nobody has confirmed a condition that is left behind.
const staleCondition = 7 * 24 * time.Hour

func (c *kubeletPass) checkConditions(node Node) {
	for _, cond := range node.Conditions {
		since := "not known"
		if !cond.Heartbeat.IsZero() {
			since = cond.Heartbeat.UTC().Format(time.RFC3339)
		}
		f := finding.Finding{
			Reason: "OrphanedCondition", Severity: finding.Info, Subject: cond.Type,
			Evidence: []finding.Evidence{{Source: "conditions of the Node", Observed: fmt.Sprintf("%s=%s, last confirmed: %s", cond.Type, cond.Status, since)}},
		}
		last, past := pastConditions[cond.Type]
		switch {
		case past:
			f.Message = fmt.Sprintf("the Node has the condition %s=%s, which no kubelet after %s writes", cond.Type, cond.Status, last)
		case cond.Heartbeat.IsZero() || strings.HasPrefix(cond.Type, ConditionPrefix),
			cond.Type == "NetworkUnavailable", // whoever makes the routes confirms it once
			c.Now.Sub(cond.Heartbeat) < staleCondition:
			continue
		default:
			f.Message = fmt.Sprintf("the Node has the condition %s=%s, which nobody has confirmed since %s", cond.Type, cond.Status, cond.Heartbeat.UTC().Format(time.DateOnly))
		}
		c.r.Add(f)
	}
}

// oldLabels are the deprecated labels that the kubelet and the cloud still set
// (kubernetes.io/docs/reference/labels-annotations-taints), and what replaces them.
var oldLabels = map[string]string{
	"beta.kubernetes.io/os":                    "kubernetes.io/os",
	"beta.kubernetes.io/arch":                  "kubernetes.io/arch",
	"beta.kubernetes.io/instance-type":         "node.kubernetes.io/instance-type",
	"failure-domain.beta.kubernetes.io/zone":   "topology.kubernetes.io/zone",
	"failure-domain.beta.kubernetes.io/region": "topology.kubernetes.io/region",
}

// keptSelectors are the pods by the deprecated label they select nodes with.
type keptSelectors struct {
	users map[string][]string
	err   error
	at    time.Time
}

// askPodsAfter is how old the list of pods may be: a node's list is megabytes.
const askPodsAfter = 30 * time.Minute

func (c *kubeletPass) checkSelectors() {
	kept, ok := Kept[keptSelectors](c.Memory, "selectors")
	if !ok || elapsed(c.Now, kept.at, askPodsAfter) || kept.err != nil && elapsed(c.Now, kept.at, c.again) {
		kept = keptSelectors{at: c.Now}
		kept.err = c.Host.KubeletAPI(c.ctx, "/pods", func(r io.Reader) (err error) {
			kept.users, err = parseSelectors(r)
			return err
		})
		c.Memory.Keep("selectors", kept)
	}
	if kept.err != nil {
		if !errors.Is(kept.err, host.ErrNotConfigured) {
			c.fail("kubelet /pods: %w", kept.err)
		}
		return
	}
	for _, label := range slices.Sorted(maps.Keys(kept.users)) {
		pods := kept.users[label]
		c.r.Add(finding.Finding{
			Reason: "DeprecatedLabels", Severity: finding.Info, Subject: label,
			Message:  fmt.Sprintf("pods on this node that select nodes by the deprecated label %s: %d", label, len(pods)),
			Evidence: []finding.Evidence{{Source: "kubelet /pods", Observed: list(pods, 5), Expected: oldLabels[label]}},
		})
	}
}

// selectingPod is the part of a pod that selects nodes.
type selectingPod struct {
	Metadata struct {
		Name      string `json:"name"`
		Namespace string `json:"namespace"`
	} `json:"metadata"`
	Spec struct {
		NodeSelector map[string]string `json:"nodeSelector"`
		Affinity     struct {
			Node struct {
				Required struct {
					Terms []nodeTerm `json:"nodeSelectorTerms"`
				} `json:"requiredDuringSchedulingIgnoredDuringExecution"`
				Preferred []struct {
					Preference nodeTerm `json:"preference"`
				} `json:"preferredDuringSchedulingIgnoredDuringExecution"`
			} `json:"nodeAffinity"`
		} `json:"affinity"`
	} `json:"spec"`
}

type nodeTerm struct {
	Expressions []struct {
		Key string `json:"key"`
	} `json:"matchExpressions"`
}

// maxSelectors bounds what is kept of pods that select by deprecated labels.
const maxSelectors = 10000

// parseSelectors returns the pods of a PodList by the deprecated label they
// select nodes with.
func parseSelectors(r io.Reader) (map[string][]string, error) {
	var users map[string][]string
	kept := 0
	err := eachPod(r, func(p selectingPod) error {
		keys := slices.Collect(maps.Keys(p.Spec.NodeSelector))
		terms := p.Spec.Affinity.Node.Required.Terms
		for _, t := range p.Spec.Affinity.Node.Preferred {
			terms = append(terms, t.Preference)
		}
		for _, t := range terms {
			for _, e := range t.Expressions {
				keys = append(keys, e.Key)
			}
		}
		slices.Sort(keys)
		for _, key := range slices.Compact(keys) {
			if _, old := oldLabels[key]; old {
				if kept++; kept > maxSelectors {
					return errors.New("more pods than a node can run")
				}
				if users == nil {
					users = map[string][]string{}
				}
				users[key] = append(users[key], cmp.Or(p.Metadata.Namespace, "default")+"/"+p.Metadata.Name)
			}
		}
		return nil
	})
	if err != nil {
		return nil, err
	}
	for _, pods := range users {
		slices.Sort(pods)
	}
	return users, nil
}
