package probes

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// updaterUnits are the units of every updater known here.
func updaterUnits() []string {
	names := []string{"apt-daily-upgrade.timer", "apt-daily-upgrade.service", "yum-cron.service", "rebootmgr.service", "zincati.service", "update-engine.service", "locksmithd.service"}
	for _, t := range slices.Concat(dnfTimers, []string{"transactional-update", "os-update", "rpm-ostreed-automatic", "bootc-fetch-apply-updates"}) {
		names = append(names, t+".timer", t+".service")
	}
	return names
}

// dnfTimers come in two kinds: what the first do their configuration says, those
// with "install" apply updates whatever it says (dnf-automatic(8), tdnf's
// automatic.conf).
var dnfTimers = []string{"dnf-automatic", "dnf-automatic-install", "dnf5-automatic", "tdnf-automatic", "tdnf-automatic-install"}

// expectedUpdater is what an operator would look for on this system.
func expectedUpdater(o host.OS) string {
	switch {
	case o.Class == host.Transactional:
		return "transactional-update.timer"
	case o.ID == "flatcar":
		return "update-engine.service"
	}
	switch familyOf(o, "") {
	case debianFamily:
		return "unattended-upgrades"
	case redHatFamily:
		return "dnf-automatic"
	case azureLinuxFamily:
		return "tdnf-automatic or dnf-automatic"
	case suseFamily:
		return "os-update.timer or YaST's online update"
	}
	return "an updater"
}

// updaters looks for what updates a system of this kind; known is false where
// nothing is known to, as on images that others replace.
func (c *updatesPass) updaters() (found []updater, known bool) {
	switch c.os.Class {
	case host.Transactional:
		return c.transactionalUpdate(), true
	case host.OSTree:
		// Without one of these a node is updated by its cluster, as RHCOS is.
		return slices.Concat(c.zincati(), c.rpmOSTree()), false
	case host.Image:
		if c.os.ID == "flatcar" {
			return c.flatcar(), true
		}
		return nil, false
	}
	switch familyOf(c.os, "") {
	case debianFamily:
		return c.unattendedUpgrades(), true
	case redHatFamily, azureLinuxFamily:
		return c.dnf(), true
	case suseFamily:
		return c.suse(), true
	}
	return nil, false
}

// settings reads files of settings, later ones over earlier ones, and remembers
// to follow those that are there.
func (c *updatesPass) settings(names ...string) map[string]string {
	all := map[string]string{}
	for _, name := range names {
		data, err := c.Host.ReadFileMax(c.ctx, name, 1<<20)
		switch {
		case errors.Is(err, fs.ErrNotExist) || errors.Is(err, host.ErrNotRegular):
			continue
		case err != nil:
			c.fail("configuration of updates: %w", err)
			c.unseen = true
			continue
		}
		c.r.Follow = append(c.r.Follow, name)
		maps.Copy(all, parseSettings(data))
	}
	return all
}

// layered lists the files of some directories by name: of two with one name the
// one in the later directory counts.
func layered(ctx context.Context, v host.View, suffix string, dirs ...string) ([]string, error) {
	winner := map[string]string{}
	for _, dir := range dirs {
		names, err := ls(ctx, v, dir, "")
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			if strings.HasSuffix(name, suffix) {
				winner[path.Base(name)] = name
			}
		}
	}
	var names []string
	for _, base := range slices.Sorted(maps.Keys(winner)) {
		names = append(names, winner[base])
	}
	return names, nil
}

// parseSettings reads "key = value" lines below "[section]" lines, as INI, TOML
// and shell variables have in common, by "section.key" in lower case. Lines that
// begin with '#' or ';' are comments.
func parseSettings(data []byte) map[string]string {
	all := map[string]string{}
	section := ""
	for line := range bytes.Lines(data) {
		text := strings.TrimSpace(string(line))
		if text == "" || text[0] == '#' || text[0] == ';' {
			continue
		}
		if text[0] == '[' {
			if name, _, ok := strings.Cut(text[1:], "]"); ok {
				section = strings.ToLower(strings.TrimSpace(name)) + "."
			}
			continue
		}
		key, value, ok := strings.Cut(text, "=")
		if !ok {
			continue
		}
		value = strings.TrimSpace(value)
		if len(value) > 0 && (value[0] == '"' || value[0] == '\'') {
			value, _, _ = strings.Cut(value[1:], value[:1])
		} else if before, _, comment := strings.Cut(value, " #"); comment {
			value = strings.TrimSpace(before)
		}
		all[section+strings.ToLower(strings.TrimSpace(key))] = value
	}
	return all
}

// truth reads a boolean as Python's and dnf's configuration parsers do.
func truth(text string) bool {
	switch strings.ToLower(text) {
	case "yes", "true", "1", "on":
		return true
	}
	return false
}

// modified is when a file was last written; zero when it is not there.
func (c *updatesPass) modified(name string) time.Time {
	st, err := c.Host.Stat(c.ctx, name)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			c.fail("when updates succeeded: %w", err)
		}
		return time.Time{}
	}
	return st.ModTime
}

// triggered fills in the last success of what a timer starts. Its service's
// result is of the same run, unless it was before the boot, when it is unknown
// and taken for a success.
func (c *updatesPass) triggered(u updater) updater {
	timer, ok := c.units[u.unit]
	if !ok {
		return u
	}
	u.lastFrom = u.unit
	if service := c.units[u.service]; !service.Running() && (service.Result == "" || service.Result == "success") {
		u.last = timer.LastTrigger
	}
	return u
}

// unattendedUpgrades is what apt.systemd.daily does (apt, debian/apt.systemd.daily):
// it ends well whatever becomes of the upgrade, and touches a stamp only after a
// success.
func (c *updatesPass) unattendedUpgrades() []updater {
	config, err := readAptConfig(c.ctx, c.Host)
	if err != nil {
		c.fail("configuration of apt: %w", err)
		c.unseen = true
		return nil
	}
	c.r.Follow = append(c.r.Follow, aptParts+"/")
	const program = "/usr/bin/unattended-upgrade"
	u := updater{
		name: "unattended-upgrades", unit: "apt-daily-upgrade.timer", service: "apt-daily-upgrade.service",
		last: c.modified("/var/lib/apt/periodic/upgrade-stamp"), lastFrom: "/var/lib/apt/periodic/upgrade-stamp",
	}
	every, on := config.interval("apt::periodic::unattended-upgrade")
	u.every = every
	if enable, set := config["apt::periodic::enable"]; set && !config.on("apt::periodic::enable") {
		on = false
		u.shown = append(u.shown, finding.Evidence{Source: aptParts, Observed: fmt.Sprintf("APT::Periodic::Enable %q", enable), Expected: `"1"`})
	} else {
		setting, set := config["apt::periodic::unattended-upgrade"]
		e := finding.Evidence{Source: aptParts, Observed: fmt.Sprintf("APT::Periodic::Unattended-Upgrade %q", setting)}
		if !set {
			e.Observed = "APT::Periodic::Unattended-Upgrade is not set"
		}
		if !on {
			e.Expected = `"1"`
		}
		u.shown = append(u.shown, e)
	}
	_, err = c.Host.Stat(c.ctx, program)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		u.shown = append(u.shown, finding.Evidence{Source: program, Observed: "not there", Expected: "the package unattended-upgrades"})
	case err != nil:
		c.fail("unattended-upgrades: %w", err)
	}
	u.installs = on && err == nil
	if config.on("unattended-upgrade::automatic-reboot") {
		u.reboots = &finding.Evidence{Source: aptParts, Observed: fmt.Sprintf("Unattended-Upgrade::Automatic-Reboot %q", config["unattended-upgrade::automatic-reboot"]), Expected: `"false"`}
	}
	if u.installs {
		c.judgeLists(config)
	}
	return []updater{u}
}

// judgeLists: unattended-upgrade knows of no update that is not in the package
// lists, and does not fetch them itself.
func (c *updatesPass) judgeLists(config aptConfig) {
	const lists = "/var/lib/apt/lists"
	fetched := c.modified(lists)
	for _, stamp := range []string{"/var/lib/apt/periodic/update-stamp", "/var/lib/apt/periodic/update-success-stamp"} {
		if at := c.modified(stamp); at.After(fetched) {
			fetched = at
		}
	}
	if fetched.IsZero() || c.Now.Sub(fetched) < c.StaleAfter.D() || c.Now.Sub(c.os.BootTime) < 24*time.Hour {
		return
	}
	e := []finding.Evidence{{Source: lists, Observed: "last fetched at " + fetched.UTC().Format(time.RFC3339), Expected: "less than " + age(c.StaleAfter.D()) + " ago"}}
	if _, on := config.interval("apt::periodic::update-package-lists"); !on {
		e = append(e, finding.Evidence{Source: aptParts, Observed: fmt.Sprintf("APT::Periodic::Update-Package-Lists %q", config["apt::periodic::update-package-lists"]), Expected: `"1"`})
	}
	c.r.Add(finding.Finding{
		Reason: "UpdatesFailing", Severity: finding.Warning, Subject: "package lists",
		Message:  "unattended-upgrades works from package lists that have not been fetched since " + fetched.UTC().Format(time.DateOnly),
		Evidence: e,
	})
}

// dnf: dnf-automatic and its likes, and yum-cron before them.
func (c *updatesPass) dnf() []updater {
	var found []updater
	for _, name := range dnfTimers {
		if !c.there(name + ".timer") {
			continue
		}
		files := []string{"/etc/dnf/automatic.conf"}
		switch {
		case strings.HasPrefix(name, "dnf5"):
			files = []string{"/usr/share/dnf5/dnf5-plugins/automatic.conf", "/etc/dnf/automatic.conf"}
		case strings.HasPrefix(name, "tdnf"):
			files = []string{"/etc/tdnf/automatic.conf"}
		}
		config := c.settings(files...)
		u := updater{name: name, unit: name + ".timer", service: name + ".service"}
		u.installs = strings.HasSuffix(name, "-install") || truth(config["commands.apply_updates"])
		if !u.installs {
			if c.switchedOff(u.unit) {
				continue // of several timers only those in use are of interest
			}
			u.shown = append(u.shown, finding.Evidence{Source: files[len(files)-1], Observed: "apply_updates = " + config["commands.apply_updates"], Expected: "yes"})
		} else if c.switchedOff(u.unit) && strings.HasSuffix(name, "-install") {
			continue
		}
		// never, when-changed, when-needed
		if reboot := config["commands.reboot"]; reboot != "" && reboot != "never" {
			u.reboots = &finding.Evidence{Source: files[len(files)-1], Observed: "reboot = " + reboot, Expected: "never"}
		}
		found = append(found, c.triggered(u))
	}
	if c.there("yum-cron.service") {
		config := c.settings("/etc/yum/yum-cron.conf")
		u := updater{name: "yum-cron", unit: "yum-cron.service", installs: truth(config["commands.apply_updates"])}
		if !u.installs {
			u.shown = append(u.shown, finding.Evidence{Source: "/etc/yum/yum-cron.conf", Observed: "apply_updates = " + config["commands.apply_updates"], Expected: "yes"})
		}
		found = append(found, u)
	}
	return found
}

// suse: os-update, and YaST's online update, which cron runs.
func (c *updatesPass) suse() []updater {
	var found []updater
	if c.there("os-update.timer") {
		u := updater{name: "os-update", unit: "os-update.timer", service: "os-update.service", installs: true}
		// auto, rebootmgr or reboot (github.com/openSUSE/os-update): it always reboots
		// when an update asks for it.
		method := c.settings("/usr/etc/os-update.conf", "/etc/os-update.conf")["reboot_cmd"]
		if c.rebootsBy(method) {
			u.reboots = &finding.Evidence{Source: "/etc/os-update.conf", Observed: "REBOOT_CMD: " + cmp.Or(method, "not set, which means auto"), Expected: "rebootmgr, with its strategy off"}
		}
		found = append(found, c.triggered(u))
	}
	const file = "/etc/sysconfig/automatic_online_update"
	if config := c.settings(file); len(config) > 0 {
		u := updater{name: "YaST online update", installs: truth(config["aou_enable_cronjob"])}
		if !u.installs {
			u.shown = append(u.shown, finding.Evidence{Source: file, Observed: fmt.Sprintf("AOU_ENABLE_CRONJOB=%q", config["aou_enable_cronjob"]), Expected: `"true"`})
		}
		found = append(found, u)
	}
	return found
}

// transactionalUpdate: the service of the timer ends with a reboot
// (transactional-update.conf(5)).
func (c *updatesPass) transactionalUpdate() []updater {
	if !c.there("transactional-update.timer") {
		return nil
	}
	u := updater{name: "transactional-update", unit: "transactional-update.timer", service: "transactional-update.service", installs: true}
	parts, err := layered(c.ctx, c.Host, "", "/usr/etc/transactional-update.conf.d")
	if err != nil {
		c.fail("configuration of updates: %w", err)
	}
	config := c.settings(slices.Concat([]string{"/usr/etc/transactional-update.conf"}, parts, []string{"/etc/transactional-update.conf"})...)
	if method := config["reboot_method"]; c.rebootsBy(method) {
		u.reboots = &finding.Evidence{Source: "/etc/transactional-update.conf", Observed: "REBOOT_METHOD: " + cmp.Or(method, "not set, which means auto"), Expected: "kured"}
	}
	return []updater{c.triggered(u)}
}

// rebootsBy reports whether SUSE's way to reboot after an update, of
// transactional-update or os-update, ends in a reboot that nobody else decides.
// rebootmgr does nothing when it is not active or its strategy is "off"; "auto"
// uses it when it is active, and systemd otherwise.
func (c *updatesPass) rebootsBy(method string) bool {
	manager := c.units["rebootmgr.service"].Running()
	off := manager && c.settings("/usr/share/rebootmgr/rebootmgr.conf", "/usr/etc/rebootmgr.conf", "/usr/etc/rebootmgr/rebootmgr.conf", "/etc/rebootmgr.conf", "/etc/rebootmgr/rebootmgr.conf")["rebootmgr.strategy"] == "off"
	switch method {
	case "kured", "notify", "none":
		return false
	case "rebootmgr":
		return manager && !off
	case "auto", "":
		return !off
	}
	return true // systemd, kexec, reboot
}

// zincati updates Fedora CoreOS and reboots as its strategy says, at once by
// default (coreos.github.io/zincati/usage/updates-strategy).
func (c *updatesPass) zincati() []updater {
	if !c.there("zincati.service") {
		return nil
	}
	names, err := layered(c.ctx, c.Host, ".toml", "/usr/lib/zincati/config.d", "/run/zincati/config.d", "/etc/zincati/config.d")
	if err != nil {
		c.fail("configuration of updates: %w", err)
	}
	config := c.settings(names...)
	u := updater{name: "zincati", unit: "zincati.service", installs: config["updates.enabled"] != "false"}
	if !u.installs {
		u.shown = append(u.shown, finding.Evidence{Source: "/etc/zincati/config.d", Observed: "updates.enabled = false", Expected: "true"})
	}
	if strategy := config["updates.strategy"]; strategy != "fleet_lock" {
		if strategy == "" {
			strategy = "immediate, the default"
		}
		u.reboots = &finding.Evidence{Source: "/etc/zincati/config.d", Observed: "updates.strategy: " + strategy, Expected: "fleet_lock"}
	}
	return []updater{u}
}

// rpmOSTree: rpm-ostree's and bootc's own timers (rpm-ostreed.conf(5),
// bootc-fetch-apply-updates.service(5)).
func (c *updatesPass) rpmOSTree() []updater {
	var found []updater
	if c.there("rpm-ostreed-automatic.timer") && !c.switchedOff("rpm-ostreed-automatic.timer") {
		policy := c.settings("/etc/rpm-ostreed.conf")["daemon.automaticupdatepolicy"]
		u := updater{name: "rpm-ostree", unit: "rpm-ostreed-automatic.timer", service: "rpm-ostreed-automatic.service"}
		switch policy {
		case "stage", "ex-stage":
			u.installs = true
		case "apply":
			u.installs = true
			u.reboots = &finding.Evidence{Source: "/etc/rpm-ostreed.conf", Observed: "AutomaticUpdatePolicy=apply", Expected: "stage"}
		}
		found = append(found, c.triggered(u))
	}
	if c.there("bootc-fetch-apply-updates.timer") && !c.switchedOff("bootc-fetch-apply-updates.timer") {
		u := updater{name: "bootc", unit: "bootc-fetch-apply-updates.timer", service: "bootc-fetch-apply-updates.service", installs: true}
		u.reboots = &finding.Evidence{Source: u.unit, Observed: "it reboots into an update as soon as it is fetched", Expected: "disabled"}
		found = append(found, c.triggered(u))
	}
	return found
}

// flatcar: update-engine installs, locksmithd reboots
// (flatcar.org/docs/latest/setup/releases/update-strategies).
func (c *updatesPass) flatcar() []updater {
	if !c.there("update-engine.service") {
		return nil
	}
	config := c.settings("/usr/share/flatcar/update.conf", "/etc/flatcar/update.conf")
	u := updater{name: "update-engine", unit: "update-engine.service", installs: config["server"] != "disabled"}
	if !u.installs {
		u.shown = append(u.shown, finding.Evidence{Source: "/etc/flatcar/update.conf", Observed: "SERVER=disabled", Expected: "not set"})
	}
	if strategy := config["reboot_strategy"]; strategy != "off" && c.units["locksmithd.service"].Running() {
		if strategy == "" {
			strategy = "not set"
		}
		u.reboots = &finding.Evidence{Source: "/etc/flatcar/update.conf", Observed: "REBOOT_STRATEGY: " + strategy + ", locksmithd.service is active", Expected: "off, or locksmithd.service masked"}
	}
	return []updater{u}
}

// parseInstallTimes reads NAME<TAB>SECONDS lines; what is not installed has none.
func parseInstallTimes(out []byte) []installedAt {
	var list []installedAt
	for line := range strings.Lines(string(out)) {
		name, text, ok := strings.Cut(strings.TrimSpace(line), "\t")
		sec, err := strconv.ParseInt(text, 10, 64)
		if !ok || err != nil || sec <= 0 || sec > 1<<40 || len(list) >= 100 {
			continue
		}
		list = append(list, installedAt{name, time.Unix(sec, 0)})
	}
	return list
}
