package probes

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"math/big"
	"path"
	"regexp"
	"slices"
	"strings"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// Kernel checks the modules and sysctls this host must have: that they are in
// force now, and that they will be after the next boot. It also publishes which
// machine this is.
type Kernel struct {
	Common
}

// DefaultKernel returns the default settings.
func DefaultKernel() Kernel { return Kernel{} }

// Name implements [Probe].
func (Kernel) Name() string { return "kernel" }

// Condition implements [Probe].
func (Kernel) Condition() string { return ConditionPrefix + "KernelProblem" }

// Wakes implements [Probe].
func (Kernel) Wakes(r Require) Wakes {
	var w Wakes
	if len(r.Modules) > 0 {
		w.Subsystems = []string{"module"}
		w.UnitFiles = true // services that load modules
		for _, dir := range []string{"/etc", "/run", "/usr/lib"} {
			w.Files = append(w.Files, followed(dir+"/modules-load.d/", dir+"/modprobe.d/")...)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Sysctls)) {
		w.Files = append(w.Files, host.FollowedFile{Name: host.SysctlPath(name)})
	}
	if len(r.Sysctls) > 0 {
		for _, dir := range []string{"/etc", "/run", "/usr/lib"} {
			w.Files = append(w.Files, followed(dir+"/sysctl.d/")...)
		}
	}
	return w
}

// Validate implements [Probe].
func (Kernel) Validate() error { return nil }

// Rules implements [Probe].
func (Kernel) Rules() []finding.Rule {
	return []finding.Rule{{
		Reason:   "ModuleNotLoaded",
		Severity: finding.Critical,
		Means:    "A kernel module that require.modules lists is neither loaded nor built in.",
		Do:       "modprobe MODULE",
	}, {
		Reason:   "ModuleUnavailable",
		Severity: finding.Critical,
		Means:    "A kernel module that require.modules lists is not loaded, and the running kernel has none of that name: the name is wrong, its package is missing, or the modules of the running kernel were removed by an update.",
		Do:       "Install the kernel's extra modules (linux-modules-extra, kernel-modules-extra), or reboot into the installed kernel. Aliases do not count: name the module as lsmod does.",
	}, {
		Reason:   "ModuleBlacklisted",
		Severity: finding.Critical,
		Also:     []finding.Severity{finding.Warning},
		Means:    "The host's configuration or the kernel's command line keeps a module from loading that require.modules lists. A warning while it is loaded all the same: it is missing after the next boot.",
		Do:       "Remove the line in the evidence, if whoever wrote it agrees.",
	}, {
		Reason:   "ModuleNotPersisted",
		Severity: finding.Warning,
		Means:    "Nothing loads a module at boot that require.modules lists: no file in modules-load.d, no modules_load= on the kernel's command line, no enabled service that loads it when it needs it.",
		Do:       "Put its name into a file of your own in /etc/modules-load.d.",
	}, {
		Reason:   "SysctlDiffers",
		Severity: finding.Warning,
		Means:    "A sysctl in force is not what require.sysctls wants.",
		Do:       "`sysctl -w NAME=VALUE`; if it changes back, something on the host sets it too.",
	}, {
		Reason:   "SysctlUnavailable",
		Severity: finding.Warning,
		Means:    "The running kernel has no such sysctl.",
		Do:       "Correct the name, or load the module it belongs to (net.bridge.* needs br_netfilter).",
	}, {
		Reason:   "SysctlNotPersisted",
		Severity: finding.Warning,
		Means:    "After the next boot a sysctl will not be what require.sysctls wants: no file in sysctl.d sets it, or the one that is read last sets something else.",
		Do:       "Put it into a file of your own in /etc/sysctl.d whose name sorts after the file in the evidence. systemd reads /etc/sysctl.conf only where a link in sysctl.d leads to it.",
	}}
}

// Check implements [Probe].
func (p Kernel) Check(ctx context.Context, in Input) (finding.Result, error) {
	var r finding.Result
	errs := []error{sampleIdentities(ctx, in, &r)}
	if len(in.Require.Modules) == 0 && len(in.Require.Sysctls) == 0 {
		r.NotApplicable = true
		r.Summary = "no module and no sysctl is required"
		return r, errors.Join(errs...)
	}
	o, err := in.Host.OS(ctx)
	if err != nil {
		errs = append(errs, fmt.Errorf("which kernel runs: %w", err))
	}
	line, err := in.Host.ReadFileMax(ctx, "/proc/cmdline", 64<<10)
	if err != nil {
		errs = append(errs, fmt.Errorf("the kernel's command line: %w", err))
	}
	pass := kernelPass{Input: in, result: &r, os: o, boot: parseKernelCommandLine(line), persists: persists(o)}
	if len(in.Require.Modules) > 0 {
		errs = append(errs, pass.modules(ctx))
	}
	if len(in.Require.Sysctls) > 0 {
		errs = append(errs, pass.sysctls(ctx))
	}
	r.Summary = fmt.Sprintf("modules required: %d; sysctls required: %d", len(in.Require.Modules), len(in.Require.Sysctls))
	if !pass.persists {
		r.Summary += "; what holds after a reboot is not in modules-load.d and sysctl.d on this system"
	}
	return r, errors.Join(errs...)
}

// persists reports whether modules-load.d and sysctl.d decide what is in force
// after a boot. Where systemd is not the init they are read by others or not at
// all; Bottlerocket makes both anew at each boot from its own API.
func persists(o host.OS) bool { return o.Init == "systemd" && o.ID != "bottlerocket" }

// kernelPass is one pass over the host.
type kernelPass struct {
	Input
	result   *finding.Result
	os       host.OS
	boot     kernelCommandLine
	persists bool
}

// moduleKey is a module's name as the kernel has it: '-' and '_' are the same.
func moduleKey(name string) string { return strings.ReplaceAll(name, "-", "_") }

func (c *kernelPass) modules(ctx context.Context) error {
	names, err := c.Host.ReadDir(ctx, "/sys/module")
	if err != nil {
		return fmt.Errorf("which modules are loaded: %w", err)
	}
	present := make(map[string]bool, len(names))
	for _, n := range names {
		present[n] = true
	}
	var errs []error
	var atBoot map[string]string
	if c.persists {
		if atBoot, err = c.loadedAtBoot(ctx); err != nil {
			errs = append(errs, err)
		}
	}
	var index moduleIndex
	var indexed, unknown bool
	seen := map[string]bool{}
	for _, name := range c.Require.Modules {
		key := moduleKey(name)
		if seen[key] {
			continue
		}
		seen[key] = true
		loadable := false
		if present[key] {
			// Only a module that was loaded has it; one that is built in and
			// has parameters is a directory without.
			switch _, err := c.Host.Stat(ctx, "/sys/module/"+key+"/initstate"); {
			case err == nil:
				loadable = true
			case !errors.Is(err, fs.ErrNotExist):
				errs = append(errs, fmt.Errorf("module %s: %w", name, err))
				continue
			}
		} else {
			if !indexed {
				indexed = true
				if index, err = c.moduleIndex(ctx); err != nil {
					unknown = true
					errs = append(errs, fmt.Errorf("modules of kernel %s: %w", c.os.Kernel, err))
				}
			}
			if unknown || index.kinds[key] == moduleBuiltIn || !c.judgeAbsent(name, index) {
				continue
			}
			loadable = true
		}
		if !loadable {
			continue
		}
		forbidden, err := c.judgeForbidden(ctx, name, key, present[key])
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if forbidden {
			continue
		}
		if !present[key] {
			c.result.Add(finding.Finding{
				Reason: "ModuleNotLoaded", Severity: finding.Critical, Subject: name,
				Message:  fmt.Sprintf("the kernel module %s is required on this host and not loaded: what needs it does not work", name),
				Evidence: []finding.Evidence{{Source: "/sys/module/" + key, Observed: "not there", Expected: "loaded or built in"}},
				Remedy:   &finding.Remedy{Action: finding.LoadModule, Subject: name},
			})
		}
		if atBoot != nil && atBoot[key] == "" {
			if err := c.judgeNotListed(ctx, name, key); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

// judgeAbsent tells that the running kernel has no such module, and reports
// whether it has one that could be loaded.
func (c *kernelPass) judgeAbsent(name string, index moduleIndex) bool {
	if index.kinds[moduleKey(name)] == moduleLoadable {
		return true
	}
	e := finding.Evidence{Source: index.dir + "/modules.dep", Observed: "no " + moduleKey(name), Expected: moduleKey(name) + ".ko"}
	why := fmt.Sprintf("the running kernel %s has none", c.os.Kernel)
	if index.missing {
		e = finding.Evidence{Source: index.dir, Observed: "not there", Expected: "the modules of the running kernel"}
		why = fmt.Sprintf("the modules of the running kernel %s are not installed", c.os.Kernel)
	}
	c.result.Add(finding.Finding{
		Reason: "ModuleUnavailable", Severity: finding.Critical, Subject: name,
		Message:  fmt.Sprintf("the kernel module %s is required on this host and can not be loaded: %s", name, why),
		Evidence: []finding.Evidence{{Source: "/sys/module/" + moduleKey(name), Observed: "not there", Expected: "loaded or built in"}, e},
	})
	return false
}

// judgeForbidden tells what keeps a module from being loaded. systemd-modules-load
// and iscsid honour "blacklist", which modprobe by hand does not.
func (c *kernelPass) judgeForbidden(ctx context.Context, name, key string, loaded bool) (bool, error) {
	where, line, err := moduleForbidden(ctx, c.Host, key)
	if err != nil {
		return false, fmt.Errorf("whether module %s is blacklisted: %w", name, err)
	}
	if where == "" {
		parameter := c.boot.forbidden[key]
		if parameter == "" {
			return false, nil
		}
		where, line = "/proc/cmdline", parameter
	}
	severity, consequence := finding.Critical, "it is not loaded, and what needs it does not work"
	if loaded {
		severity, consequence = finding.Warning, "after the next boot it is missing"
	}
	c.result.Add(finding.Finding{
		Reason: "ModuleBlacklisted", Severity: severity, Subject: name,
		Message:  fmt.Sprintf("the kernel module %s is required on this host and forbidden by its configuration: %s", name, consequence),
		Evidence: []finding.Evidence{{Source: where, Observed: line, Expected: "no such entry"}},
	})
	return true, nil
}

// loaders are the services that load a module themselves when they need it, by
// the units that start them: iscsid its transport when somebody logs in
// (open-iscsi, usr/transport.c), and device-mapper the multipath target when
// multipathd makes its first map (drivers/md/dm-target.c). Where one is enabled,
// the module need not be in modules-load.d besides.
func loaders(module string) []string {
	switch module {
	case "iscsi_tcp", "libiscsi", "libiscsi_tcp", "scsi_transport_iscsi":
		return []string{"iscsid.service", "iscsid.socket"}
	case "dm_multipath", "dm_mod":
		return []string{"multipathd.service"}
	}
	return nil
}

func (c *kernelPass) judgeNotListed(ctx context.Context, name, key string) error {
	e := []finding.Evidence{{Source: "modules-load.d", Observed: "no file lists " + key, Expected: key}}
	if names := loaders(key); len(names) > 0 {
		units, err := c.Host.Units(ctx, names...)
		if err != nil && !errors.Is(err, host.ErrNoSystemd) {
			return fmt.Errorf("what loads module %s at boot: %w", name, err)
		}
		for _, u := range units {
			if enabledAtBoot(u.FileState) && u.FileState != "static" && u.Load == "loaded" {
				return nil
			}
			e = append(e, finding.Evidence{Source: u.Name, Observed: strings.TrimSpace(u.Load + " " + u.FileState), Expected: "enabled: it loads the module when it needs it"})
		}
	}
	c.result.Add(finding.Finding{
		Reason: "ModuleNotPersisted", Severity: finding.Warning, Subject: name,
		Message:  fmt.Sprintf("nothing loads the kernel module %s at boot: after the next one it may be missing", name),
		Evidence: e,
		Remedy:   &finding.Remedy{Action: finding.PersistModule, Subject: name},
	})
	return nil
}

// loadedAtBoot returns where each module is listed that systemd-modules-load
// loads.
func (c *kernelPass) loadedAtBoot(ctx context.Context) (map[string]string, error) {
	at := maps.Clone(c.boot.loaded)
	if at == nil {
		at = map[string]string{}
	}
	files, err := dropins(ctx, c.Host, "modules-load.d")
	if err != nil {
		return nil, fmt.Errorf("which modules are loaded at boot: %w", err)
	}
	for _, f := range files {
		for _, m := range parseModulesLoad(f.data) {
			at[m] = f.path
		}
	}
	return at, nil
}

// parseModulesLoad reads a file of modules-load.d(5): a name a line, '#' and ';'
// begin comments.
func parseModulesLoad(data []byte) []string {
	var names []string
	for line := range bytes.Lines(data) {
		text := string(bytes.TrimSpace(line))
		if text == "" || text[0] == '#' || text[0] == ';' {
			continue
		}
		names = append(names, moduleKey(text))
	}
	return names
}

// A dropin is one file of a *.d directory that is in force.
type dropin struct {
	path string
	data []byte
}

// dropins reads the files systemd reads of a directory such as sysctl.d, in its
// order: by name, whatever directory they are in; one in a directory named
// earlier hides those of its name, and a link to /dev/null hides them for good.
func dropins(ctx context.Context, v host.View, kind string) ([]dropin, error) {
	winner := map[string]string{}
	for _, dir := range []string{"/etc", "/run", "/usr/local/lib", "/usr/lib", "/lib"} {
		files, err := ls(ctx, v, dir+"/"+kind, "")
		if err != nil {
			return nil, err
		}
		for _, file := range files {
			base := path.Base(file)
			if strings.HasSuffix(base, ".conf") && winner[base] == "" {
				winner[base] = file
			}
		}
	}
	var found []dropin
	for _, base := range slices.Sorted(maps.Keys(winner)) {
		data, err := v.ReadFileMax(ctx, winner[base], 1<<20)
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, host.ErrNotRegular) {
			continue
		}
		if err != nil {
			return nil, err
		}
		found = append(found, dropin{winner[base], data})
	}
	return found, nil
}

// moduleKind is how the running kernel has a module.
type moduleKind byte

const (
	moduleLoadable moduleKind = 1 + iota
	moduleBuiltIn
)

// moduleIndex is what the kernel's module lists say about the required modules.
// The lists have some 600 kB, so that it is kept while they do not change.
type moduleIndex struct {
	release string
	// dir holds the modules; missing says that it is not there.
	dir     string
	missing bool
	// stamp is modules.dep's when it was read, wanted what was asked.
	stamp  fileID
	wanted []string
	kinds  map[string]moduleKind
}

func (c *kernelPass) moduleIndex(ctx context.Context) (moduleIndex, error) {
	if c.os.Kernel == "" {
		return moduleIndex{}, errors.New("its release is not known")
	}
	if old, ok := Kept[moduleIndex](c.Memory, "modules"); ok && !old.missing && old.release == c.os.Kernel && slices.Equal(old.wanted, c.Require.Modules) {
		if now, err := statID(ctx, c.Host, old.dir+"/modules.dep"); err == nil && now == old.stamp {
			return old, nil
		}
	}
	wanted := make(map[string]bool, len(c.Require.Modules))
	for _, m := range c.Require.Modules {
		wanted[moduleKey(m)] = true
	}
	dir, dep, builtin, err := kernelModules(ctx, c.Host, c.os.Kernel)
	index := moduleIndex{release: c.os.Kernel, dir: dir, wanted: c.Require.Modules}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		// A kernel for one machine, with all it needs built in, comes without
		// lists and so can not be asked; one that has loaded modules had them.
		loaded, err := c.Host.ReadFileMax(ctx, "/proc/modules", 4<<20)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return index, err
		}
		if len(bytes.TrimSpace(loaded)) == 0 {
			return index, fmt.Errorf("no module is loaded and %s is not there, so what is built in can not be told", dir)
		}
		index.missing = true
		return index, nil
	case err != nil:
		return index, err
	}
	if index.stamp, err = statID(ctx, c.Host, dir+"/modules.dep"); err != nil {
		return index, err
	}
	index.kinds = map[string]moduleKind{}
	findModules(index.kinds, dep, wanted, moduleLoadable)
	findModules(index.kinds, builtin, wanted, moduleBuiltIn)
	c.Memory.Keep("modules", index)
	return index, nil
}

// findModules looks for wanted modules in modules.dep ("kernel/x/a-b.ko.xz:
// kernel/y/c.ko") or modules.builtin ("kernel/x/a-b.ko"), modprobe(8).
func findModules(kinds map[string]moduleKind, list []byte, wanted map[string]bool, kind moduleKind) {
	for line := range bytes.Lines(list) {
		file, _, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		stem, _, ok := bytes.Cut(file[bytes.LastIndexByte(file, '/')+1:], []byte(".ko"))
		if !ok {
			continue
		}
		if key := moduleKey(string(stem)); wanted[key] {
			kinds[key] = kind
		}
	}
}

// kernelCommandLine is what the kernel's command line says about modules and
// sysctls.
type kernelCommandLine struct {
	// forbidden and loaded name the parameter by module.
	forbidden, loaded map[string]string
	// sysctls are set by the kernel before init, by path below /proc/sys.
	sysctls map[string]string
}

// parseKernelCommandLine reads module_blacklist= (the kernel's own),
// modprobe.blacklist= (kmod's), modules_load= (systemd-modules-load(8)) and
// sysctl.NAME=VALUE (kernel-parameters.txt).
func parseKernelCommandLine(data []byte) kernelCommandLine {
	c := kernelCommandLine{forbidden: map[string]string{}, loaded: map[string]string{}, sysctls: map[string]string{}}
	for _, word := range strings.Fields(string(data)) {
		key, value, _ := strings.Cut(word, "=")
		into := c.loaded
		switch key {
		case "module_blacklist", "modprobe.blacklist":
			into = c.forbidden
		case "modules_load", "modules-load":
		default:
			if name, ok := strings.CutPrefix(key, "sysctl."); ok {
				c.sysctls[sysctlKey(name)] = value
			}
			continue
		}
		for name := range strings.SplitSeq(value, ",") {
			into[moduleKey(name)] = key + "=" + name
		}
	}
	return c
}

const sysctlRoot = "/proc/sys/"

func (c *kernelPass) sysctls(ctx context.Context) error {
	// Without it nothing is in force, rather than everything unavailable: a
	// tree at rest.
	if _, err := c.Host.Stat(ctx, "/proc/sys/kernel"); err != nil {
		return fmt.Errorf("which sysctls are in force: %w", err)
	}
	var errs []error
	var conf sysctlConf
	configured := false
	if c.persists {
		files, err := dropins(ctx, c.Host, "sysctl.d")
		if err != nil {
			errs = append(errs, fmt.Errorf("which sysctls are set at boot: %w", err))
		} else {
			configured = true
			conf = readSysctlConf(files)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(c.Require.Sysctls)) {
		want := parseSysctlWant(c.Require.Sysctls[name])
		key := sysctlKey(name)
		data, err := c.Host.ReadFileMax(ctx, sysctlRoot+key, 64<<10)
		switch {
		case errors.Is(err, fs.ErrNotExist):
			c.result.Add(finding.Finding{
				Reason: "SysctlUnavailable", Severity: finding.Warning, Subject: name,
				Message:  fmt.Sprintf("the running kernel has no sysctl %s, which must be %s on this host: its module may not be loaded", name, want),
				Evidence: []finding.Evidence{{Source: host.SysctlPath(name), Observed: "not there", Expected: want.String()}},
			})
		case err != nil:
			errs = append(errs, fmt.Errorf("sysctl %s: %w", name, err))
			continue
		default:
			if got := plainSysctl(string(data)); !want.satisfied(got) {
				c.result.Add(finding.Finding{
					Reason: "SysctlDiffers", Severity: finding.Warning, Subject: name,
					Message:  fmt.Sprintf("the sysctl %s is %s and must be %s on this host", name, quoted(got), want),
					Evidence: []finding.Evidence{{Source: host.SysctlPath(name), Observed: quoted(got), Expected: want.String()}},
					Remedy:   &finding.Remedy{Action: finding.SetSysctl, Subject: name},
				})
			}
		}
		if configured {
			if err := c.judgePersisted(ctx, name, key, want, conf); err != nil {
				errs = append(errs, err)
			}
		}
	}
	return errors.Join(errs...)
}

func (c *kernelPass) judgePersisted(ctx context.Context, name, key string, want sysctlWant, conf sysctlConf) error {
	set, ok := conf.of(key)
	if !ok {
		if value, given := c.boot.sysctls[key]; given {
			set, ok = sysctlSetting{key: key, value: value, set: true, source: "/proc/cmdline"}, true
		}
	}
	if ok && want.satisfied(set.value) {
		return nil
	}
	f := finding.Finding{
		Reason: "SysctlNotPersisted", Severity: finding.Warning, Subject: name,
		Remedy: &finding.Remedy{Action: finding.PersistSysctl, Subject: name},
	}
	if ok {
		f.Message = fmt.Sprintf("after the next boot the sysctl %s is %s, and it must be %s on this host", name, quoted(set.value), want)
		f.Evidence = []finding.Evidence{{Source: set.source, Observed: quoted(set.value), Expected: want.String()}}
	} else {
		f.Message = fmt.Sprintf("nothing sets the sysctl %s at boot, and it must be %s on this host: what is in force may be gone after the next one", name, want)
		f.Evidence = []finding.Evidence{{Source: "sysctl.d", Observed: "no file sets " + name, Expected: want.String()}}
	}
	// What procps reads and systemd does not: many an admin still writes there.
	const old = "/etc/sysctl.conf"
	data, err := c.Host.ReadFileMax(ctx, old, 1<<20)
	switch {
	case err == nil:
		if own, ok := readSysctlConf([]dropin{{old, data}}).of(key); ok && want.satisfied(own.value) {
			f.Evidence = append(f.Evidence, finding.Evidence{Source: own.source, Observed: quoted(own.value) + ", and systemd does not read this file", Expected: "a file in /etc/sysctl.d"})
		}
	case !errors.Is(err, fs.ErrNotExist) && !errors.Is(err, host.ErrNotRegular):
		return fmt.Errorf("%s: %w", old, err)
	}
	c.result.Add(f)
	return nil
}

func quoted(s string) string {
	if s == "" {
		return "empty"
	}
	return shown(truncate([]byte(s), 64))
}

// sysctlKey is where a sysctl lies below /proc/sys, one for both ways to write it.
func sysctlKey(name string) string { return strings.TrimPrefix(host.SysctlPath(name), sysctlRoot) }

// plainSysctl is a value with single blanks between its parts.
func plainSysctl(s string) string { return strings.Join(strings.Fields(s), " ") }

// sysctlSetting is one line of a sysctl.d file.
type sysctlSetting struct {
	// key is the path below /proc/sys, which may be a pattern.
	key, value string
	// set is false for "-key" alone, which takes the key out of patterns.
	set    bool
	source string
}

// parseSysctl reads a file of sysctl.d(5): KEY=VALUE lines; '#' and ';' begin
// comments; a '-' before the key has errors ignored, and with no value takes
// the key out of all patterns. systemd passes over other lines.
func parseSysctl(data []byte) []sysctlSetting {
	var all []sysctlSetting
	for line := range bytes.Lines(data) {
		text := strings.TrimSpace(string(line))
		if text == "" || text[0] == '#' || text[0] == ';' {
			continue
		}
		key, value, set := strings.Cut(text, "=")
		key, dash := strings.CutPrefix(strings.TrimSpace(key), "-")
		if key = strings.TrimPrefix(key, "/"); !set && !dash || key == "" {
			continue
		}
		all = append(all, sysctlSetting{key: sysctlKey(key), value: plainSysctl(value), set: set})
	}
	return all
}

// sysctlConf is what systemd-sysctl does at boot.
type sysctlConf struct {
	explicit map[string]sysctlSetting
	// patterns in the order of their last appearance.
	patterns []sysctlSetting
}

func readSysctlConf(files []dropin) sysctlConf {
	c := sysctlConf{explicit: map[string]sysctlSetting{}}
	at := map[string]int{}
	for _, f := range files {
		for _, s := range parseSysctl(f.data) {
			s.source = f.path
			if !strings.ContainsAny(s.key, "*?[") {
				c.explicit[s.key] = s
				continue
			}
			if i, again := at[s.key]; again {
				c.patterns[i].set = false
			}
			at[s.key] = len(c.patterns)
			c.patterns = append(c.patterns, s)
		}
	}
	return c
}

// of returns the line that decides about a key. One that names it goes before
// all patterns, wherever it stands; otherwise the last one wins.
func (c sysctlConf) of(key string) (sysctlSetting, bool) {
	if s, ok := c.explicit[key]; ok {
		return s, s.set
	}
	for _, s := range slices.Backward(c.patterns) {
		if ok, err := path.Match(s.key, key); ok && err == nil && s.set {
			return s, true
		}
	}
	return sysctlSetting{}, false
}

// sysctlWant is a value of require.sysctls.
type sysctlWant struct {
	// op is ">=", "<=", ">" or "<", or "" for a value that must be equal.
	op    string
	value string
}

var (
	sysctlName  = regexp.MustCompile(`^[A-Za-z0-9_-]+([./][A-Za-z0-9_:@-]+)+$`)
	sysctlBound = regexp.MustCompile(`^(>=|<=|>|<)\s*(.*)$`)
)

func parseSysctlWant(text string) sysctlWant {
	text = plainSysctl(text)
	if m := sysctlBound.FindStringSubmatch(text); m != nil {
		return sysctlWant{m[1], m[2]}
	}
	return sysctlWant{"", text}
}

func validSysctl(name, text string) error {
	if !sysctlName.MatchString(name) {
		return errors.New("is no sysctl: want a name such as kernel.pid_max")
	}
	if path.Base(sysctlKey(name)) == "stable_secret" {
		return errors.New("holds a secret, which the agent does not read")
	}
	want := parseSysctlWant(text)
	switch {
	case want.op == "" && want.value == "":
		return errors.New(`want a value, or a bound such as ">=131072"`)
	case want.op != "":
		if _, ok := new(big.Int).SetString(want.value, 10); !ok {
			return fmt.Errorf("want a whole number after %s, not %q", want.op, want.value)
		}
	}
	return nil
}

// String is "131072" or "at least 131072".
func (w sysctlWant) String() string {
	switch w.op {
	case ">=":
		return "at least " + w.value
	case "<=":
		return "at most " + w.value
	case ">":
		return "more than " + w.value
	case "<":
		return "less than " + w.value
	}
	return w.value
}

// satisfied compares a value in force; 64-bit unsigned ones are common
// (kernel.shmmax). A bound holds for a single number only.
func (w sysctlWant) satisfied(got string) bool {
	if w.op == "" {
		return plainSysctl(got) == w.value
	}
	have, ok := new(big.Int).SetString(got, 10)
	bound, valid := new(big.Int).SetString(w.value, 10)
	if !ok || !valid {
		return false
	}
	order := have.Cmp(bound)
	switch w.op {
	case ">=":
		return order >= 0
	case "<=":
		return order <= 0
	case ">":
		return order > 0
	}
	return order < 0
}

// SysctlTarget is the value to set so that a requirement such as ">=131072" is
// met: the nearest one.
func SysctlTarget(want string) string {
	w := parseSysctlWant(want)
	n, ok := new(big.Int).SetString(w.value, 10)
	if !ok {
		return w.value
	}
	switch w.op {
	case ">":
		n.Add(n, big.NewInt(1))
	case "<":
		n.Sub(n, big.NewInt(1))
	case "":
		return w.value
	}
	return n.String()
}

// SysctlPath is where a sysctl of require.sysctls lies on the host.
func SysctlPath(name string) string { return host.SysctlPath(name) }

// MeetSysctl returns a requirement that meets both of two for one sysctl, and
// false where there is none that can be written as one.
func MeetSysctl(a, b string) (string, bool) {
	x, y := parseSysctlWant(a), parseSysctlWant(b)
	switch {
	case x == y:
		return a, true
	case x.op == "" && y.op != "" && y.satisfied(x.value):
		return a, true
	case y.op == "" && x.op != "" && x.satisfied(y.value):
		return b, true
	case x.op == "" || x.op != y.op:
		return "", false
	case x.satisfied(y.value):
		return b, true // the stricter of two bounds in one direction
	}
	return a, true
}
