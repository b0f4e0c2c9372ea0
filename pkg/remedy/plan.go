// Package remedy repairs what probes find. A [Plan] is computed purely, from
// reports and facts, and says every command, file and unit it would touch; an
// [Applier] carries out one step of it at a time, through a [Changer] that only
// exists where repairs were asked for. Whether a step has cured anything the
// next check says, never the step.
package remedy

import (
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/config"
	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
)

// Files of our own on the host.
const (
	modulesFile = "/etc/modules-load.d/host-hygiene.conf"
	sysctlFile  = "/etc/sysctl.d/90-host-hygiene.conf"
	dropInName  = "90-host-hygiene.conf"
	// multipathDir is compiled into multipath-tools; what lies there outranks
	// multipath.conf.
	multipathDir  = "/etc/multipath/conf.d"
	multipathConf = "/etc/multipath.conf"
	initiatorFile = "/etc/iscsi/initiatorname.iscsi"
	rebootFile    = "/run/reboot-required"
)

// Plan is what would be done, in order.
type Plan struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
	// ID is the same for the same steps.
	ID    string    `json:"id"`
	Made  time.Time `json:"time"`
	Steps []Step    `json:"steps"`
	// Without are the findings that count and that no step is for.
	Without []Why `json:"withoutRemedy,omitempty"`
	// Left is what earlier plans have left on this host.
	Left []Left `json:"left,omitempty"`
	// Unseen is what could not be looked at; steps that need it are refused.
	Unseen []string `json:"unseen,omitempty"`
}

// Step is one thing that is done or not, on its own.
type Step struct {
	// ID is stable: it names the unit the step runs as, and the step from one
	// plan to the next.
	ID   string `json:"id"`
	Kind string `json:"kind"`
	// Actions are those of the remedies the step serves.
	Actions  []string `json:"actions"`
	Subjects []string `json:"subjects"`
	Why      []Why    `json:"why"`

	// What is done, in this order.
	Files    []FileChange  `json:"files,omitempty"`
	Commands []Command     `json:"commands,omitempty"`
	Sysctl   *SysctlChange `json:"sysctl,omitempty"`
	Units    []UnitChange  `json:"units,omitempty"`
	OOMScore *ScoreChange  `json:"oomScore,omitempty"`

	// DependsOn names steps that must have succeeded before.
	DependsOn []string `json:"dependsOn,omitempty"`
	// AfterReboot: the effect only shows after a reboot, which others do.
	AfterReboot bool `json:"afterReboot,omitempty"`
	// Simulation is "not simulated", or what the package manager's own dry run
	// says; empty where the plan itself is all there is to say.
	Simulation  string       `json:"simulation,omitempty"`
	Transaction *Transaction `json:"transaction,omitempty"`
	// Refused says why the step is not done; empty when it would be.
	Refused string `json:"refused,omitempty"`

	manager  Manager
	requests []string
}

// NotSimulated marks a step of which only the package manager knows the rest.
const NotSimulated = "not simulated"

// Why is a finding the step is to cure.
type Why struct {
	Probe   string `json:"probe"`
	Reason  string `json:"reason"`
	Subject string `json:"subject,omitempty"`
	Message string `json:"message"`
}

// Command is executed on the host, as a unit of its own.
type Command struct {
	Argv []string `json:"argv"`
	Env  []string `json:"env,omitempty"`
	// Limit is how long it may take, in whole seconds.
	LimitSeconds int `json:"limitSeconds"`
	// Prepares: it only makes ready for the next, such as apt-get update.
	Prepares bool `json:"prepares,omitempty"`
}

// FileChange is a file before and after.
type FileChange struct {
	Path string `json:"path"`
	// Mode and Owner are what the file will have, e.g. "0644", "0:0".
	Mode  string `json:"mode"`
	Owner string `json:"owner"`
	// Create: the file is not there, and nothing that appears is overwritten.
	Create bool `json:"create,omitempty"`
	// Diff is unified. Where not everybody may read the file, what stands in it
	// is not shown.
	Diff string `json:"diff"`

	before, after string
	mode          fs.FileMode
	uid, gid      uint32
	// random: the content is made when the step runs.
	random bool
}

// SysctlChange is a live kernel setting.
type SysctlChange struct {
	Name  string `json:"name"`
	Value string `json:"value"`
}

// UnitChange is something done to a unit of systemd.
type UnitChange struct {
	Unit string `json:"unit"`
	// Do is unmask, enable, start or reload; daemon-reload has no unit.
	Do string `json:"do"`
}

// ScoreChange is the live oom_score_adj of a unit's main process.
type ScoreChange struct {
	Unit  string `json:"unit"`
	Score int    `json:"score"`
}

// Input is all a plan is made from.
type Input struct {
	Reports  []finding.Report
	Require  probes.Require
	Remedies config.Remedies
	Facts    Facts
	Now      time.Time
}

// New computes the plan. Findings that are muted are left alone, and so is what
// no rule knows how to repair.
func New(in Input) Plan {
	p := planner{Input: in, steps: map[string]*Step{}}
	var without []Why
	for _, r := range in.Reports {
		for _, f := range r.Findings {
			switch {
			case f.Muted != nil:
			case f.Remedy != nil:
				p.add(r.Probe, f)
			case f.Counts():
				without = append(without, Why{r.Probe, f.Reason, f.Subject, f.Message})
			}
		}
	}
	p.persist()
	plan := Plan{APIVersion: config.APIVersion, Kind: "RemedyPlan", Made: in.Now.UTC().Truncate(time.Second), Without: without, Left: in.Facts.Left, Unseen: in.Facts.Unseen}
	for _, s := range p.ordered() {
		plan.Steps = append(plan.Steps, *s)
	}
	plan.ID = digest(plan.Steps)
	return plan
}

func digest(v any) string {
	data, err := json.Marshal(v)
	if err != nil {
		return "0"
	}
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:6])
}

// Digest tells a step from another of the same ID that would do something else.
// Why it is done does not count: messages hold numbers that move.
func (s Step) Digest() string {
	s.Why, s.Refused, s.Simulation, s.Transaction, s.DependsOn = nil, "", "", nil, nil
	return digest(s)
}

// Pending lists the steps that would be done.
func (p Plan) Pending() []Step {
	return slices.DeleteFunc(slices.Clone(p.Steps), func(s Step) bool { return s.Refused != "" })
}

type planner struct {
	Input
	steps map[string]*Step
	order []string
	// What goes into our files.
	modules, sysctls []entry
}

type entry struct {
	name, value string
	action      string
	why         Why
}

// step returns the step of an ID, made if need be, with one more reason.
func (p *planner) step(id, action, subject string, why Why) *Step {
	s := p.steps[id]
	if s == nil {
		s = &Step{ID: id, Kind: finding.Kind(action)}
		p.steps[id] = s
		p.order = append(p.order, id)
	}
	if !slices.Contains(s.Actions, action) {
		s.Actions = append(s.Actions, action)
	}
	if !slices.Contains(s.Subjects, subject) {
		s.Subjects = append(s.Subjects, subject)
	}
	s.Why = append(s.Why, why)
	return s
}

func (s *Step) refuse(format string, args ...any) {
	if s.Refused == "" {
		s.Refused = fmt.Sprintf(format, args...)
	}
}

func (p *planner) add(probe string, f finding.Finding) {
	why := Why{probe, f.Reason, f.Subject, f.Message}
	action, subject := f.Remedy.Action, f.Remedy.Subject
	switch action {
	case finding.InstallPackage:
		p.step("packages", action, subject, why)
	case finding.ConfigureDpkg:
		s := p.step("dpkg", action, subject, why)
		s.Commands = []Command{{Argv: configureArgv(), Env: append(baseEnv(), Apt.env()...), LimitSeconds: int(packageLimit.Seconds())}}
		s.manager = Apt
	case finding.UnmaskUnit:
		p.unit(p.step(stepID("unit", subject), action, subject, why), subject, "unmask")
	case finding.EnableUnit:
		p.unit(p.step(stepID("unit", subject), action, subject, why), subject, "enable")
	case finding.StartUnit:
		p.unit(p.step(stepID("unit", subject), action, subject, why), subject, "start")
	case finding.LoadModule:
		s := p.step(stepID("module", subject), action, subject, why)
		s.Commands = []Command{{Argv: []string{p.Facts.Modprobe, "--", subject}, Env: baseEnv(), LimitSeconds: 120}}
		if !p.Facts.ModulesListed[moduleName(subject)] {
			p.modules = append(p.modules, entry{subject, "", finding.PersistModule, why})
		}
	case finding.PersistModule:
		p.modules = append(p.modules, entry{subject, "", action, why})
	case finding.SetSysctl:
		s := p.step(stepID("sysctl", subject), action, subject, why)
		value, ok := p.sysctlValue(s, subject)
		if ok {
			s.Sysctl = &SysctlChange{subject, value}
			p.sysctls = append(p.sysctls, entry{subject, value, finding.PersistSysctl, why})
		}
	case finding.PersistSysctl:
		s := &Step{}
		if value, ok := p.sysctlValue(s, subject); ok {
			p.sysctls = append(p.sysctls, entry{subject, value, action, why})
		} else {
			p.step("sysctls-file", action, subject, why).refuse("%s", s.Refused)
		}
	case finding.WriteFile:
		p.file(p.step(stepID("file", subject), action, subject, why), subject)
	case finding.CreateInitiatorName:
		p.initiator(p.step("initiator-name", action, initiatorFile, why))
	case finding.SetOOMScore, finding.PersistOOMScore:
		p.oomScore(p.step(stepID("oom", subject), action, subject, why), action, subject)
	default:
		p.step(stepID("unknown", action), action, subject, why).refuse("this agent does not know how to %q", action)
	}
}

// stepID makes a name that can stand in the name of a unit. Subjects that differ
// give IDs that differ.
func stepID(kind, subject string) string {
	plain := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '.' || r == '_' || r == '-' {
			return r
		}
		return '-'
	}, subject)
	if plain != subject || len(plain) > 80 {
		plain = strings.Trim(plain[:min(len(plain), 80)], "-") + "-" + digest(subject)[:6]
	}
	return kind + "-" + plain
}

func moduleName(s string) string { return strings.ReplaceAll(s, "-", "_") }

// loginUnits log in to every target on record when they start, and wait for the
// dead ones (longhorn#3630): the agent neither starts nor enables them.
var loginUnits = []string{"iscsi.service", "open-iscsi.service"}

func (p *planner) unit(s *Step, unit, do string) {
	if slices.Contains(loginUnits, unit) && do != "unmask" {
		s.refuse("%s logs in to every iSCSI target on record and can hang on the dead ones: a person has to %s it", unit, do)
	}
	// Whether a unit of a MachineConfig is enabled or masked stands there, and the
	// node's next update makes it so again. Starting it leaves that alone.
	switch {
	case do == "start":
	case p.Facts.MCO.Err != "":
		s.refuse("whether OpenShift's Machine Config Operator owns %s can not be told, because %s", unit, p.Facts.MCO.Err)
	case p.Facts.MCO.Files[path.Join("/etc/systemd/system", unit)]:
		s.refuse("%s is owned by OpenShift's Machine Config Operator: %s it in a MachineConfig", unit, do)
	}
	c := UnitChange{unit, do}
	if !slices.Contains(s.Units, c) {
		s.Units = append(s.Units, c)
	}
	slices.SortStableFunc(s.Units, func(a, b UnitChange) int { return cmp.Compare(unitOrder(a.Do), unitOrder(b.Do)) })
}

func unitOrder(do string) int { return slices.Index([]string{"unmask", "enable", "start"}, do) }

// sysctlValue is the value that satisfies a requirement.
func (p *planner) sysctlValue(s *Step, name string) (string, bool) {
	want, ok := p.Require.Sysctls[name]
	if !ok {
		s.refuse("no value for %s stands in require.sysctls", name)
		return "", false
	}
	return probes.SysctlTarget(want), true
}

// persist plans our own files for modules and sysctls: one file each, whatever
// number of entries. What stands in it stays.
func (p *planner) persist() {
	if len(p.modules) > 0 {
		for _, e := range p.modules {
			p.step("modules-file", e.action, e.name, e.why)
		}
		before := p.Facts.Files[modulesFile].Data
		p.change(p.steps["modules-file"], modulesFile, addLines(before, p.modules, moduleLine), nil)
	}
	if len(p.sysctls) > 0 {
		for _, e := range p.sysctls {
			p.step("sysctls-file", e.action, e.name, e.why)
		}
		before := p.Facts.Files[sysctlFile].Data
		p.change(p.steps["sysctls-file"], sysctlFile, addLines(before, p.sysctls, sysctlLine), nil)
	}
}

const ownHeader = "# Written by host-hygiene; agent rollback takes it back.\n"

func moduleLine(line string) string { return moduleName(strings.TrimSpace(line)) }

func sysctlLine(line string) string {
	name, _, _ := strings.Cut(strings.TrimPrefix(strings.TrimSpace(line), "-"), "=")
	return probes.SysctlPath(strings.TrimSpace(name))
}

// addLines sets entries in a file of ours; key tells which entry a line is.
func addLines(before string, entries []entry, key func(string) string) string {
	lines := splitLines(before)
	if before == "" {
		lines = []string{ownHeader}
	}
	if n := len(lines); !strings.HasSuffix(lines[n-1], "\n") {
		lines[n-1] += "\n"
	}
	entries = slices.Clone(entries)
	slices.SortStableFunc(entries, func(a, b entry) int { return cmp.Compare(a.name, b.name) })
	for _, e := range entries {
		text := e.name + "\n"
		if e.value != "" {
			text = e.name + " = " + e.value + "\n"
		}
		i := slices.IndexFunc(lines, func(l string) bool { return !strings.HasPrefix(l, "#") && key(l) == key(text) })
		if i >= 0 {
			lines[i] = text
		} else {
			lines = append(lines, text)
		}
	}
	return strings.Join(lines, "")
}

func (p *planner) file(s *Step, name string) {
	i := slices.IndexFunc(p.Require.Files, func(f probes.RequiredFile) bool { return f.Path == name })
	if i < 0 {
		s.refuse("no content for %s stands in require.files", name)
		return
	}
	if len(s.Files) > 0 {
		return
	}
	want := p.Require.Files[i]
	p.change(s, name, want.Content, &want)
	switch {
	case isMultipathConfig(name):
		if err := checkMultipathSyntax([]byte(want.Content)); err != nil {
			s.refuse("%s would not be understood by multipathd: %v", name, err)
		}
		if p.Facts.Units["multipathd.service"].Active == "active" {
			s.Units = append(s.Units, UnitChange{"multipathd.service", "reload"})
		}
	case strings.HasPrefix(name, "/etc/systemd/"):
		s.Units = append(s.Units, UnitChange{"", "daemon-reload"})
	}
}

func isMultipathConfig(name string) bool {
	return name == multipathConf || path.Dir(name) == multipathDir && strings.HasSuffix(name, ".conf")
}

// change plans the content of one file; want may set its mode and owner.
func (p *planner) change(s *Step, name, after string, want *probes.RequiredFile) {
	now := p.Facts.Files[name]
	c := FileChange{Path: name, Create: !now.Exists, before: now.Data, after: after, mode: 0o644}
	if now.Exists {
		c.mode, c.uid, c.gid = now.Mode, now.UID, now.GID
	}
	if want != nil && want.Mode != "" {
		if m, err := strconv.ParseUint(want.Mode, 8, 12); err == nil {
			c.mode = fs.FileMode(m & 0o777)
		} else {
			s.refuse("%q is no mode for %s", want.Mode, name)
		}
	}
	if want != nil && want.Owner != "" {
		owner, ok := p.Facts.Owners[want.Owner]
		if !ok {
			s.refuse("%s should belong to %s, which this host does not know", name, want.Owner)
		}
		c.uid, c.gid = owner[0], owner[1]
	}
	c.describe(now)
	s.Files = append(s.Files, c)
	p.mayWrite(s, name, now)
}

func (c *FileChange) describe(now FileFact) {
	c.Mode, c.Owner = fmt.Sprintf("%04o", c.mode.Perm()), fmt.Sprintf("%d:%d", c.uid, c.gid)
	switch {
	case now.Exists && now.Mode.Perm()&0o004 == 0 && now.Data != "":
		c.Diff = fmt.Sprintf("--- %s\n+++ %s\n%d lines that not everybody may read become %d lines\n", c.Path, c.Path, len(splitLines(now.Data)), len(splitLines(c.after)))
	default:
		c.Diff = unifiedDiff(c.Path, c.before, c.after, now.Exists)
	}
	if now.Exists && (now.Mode.Perm() != c.mode.Perm() || now.UID != c.uid || now.GID != c.gid) {
		c.Diff += fmt.Sprintf("mode %04o, owner %d:%d become mode %s, owner %s\n", now.Mode.Perm(), now.UID, now.GID, c.Mode, c.Owner)
	}
}

// mayWrite refuses files that are not the agent's to write.
func (p *planner) mayWrite(s *Step, name string, now FileFact) {
	switch {
	case now.Err != "":
		s.refuse("%s can not be read, so it is not known what would be overwritten: %s", name, now.Err)
	case now.Symlink:
		s.refuse("%s is a symbolic link: give the path of the file it leads to", name)
	case p.Facts.MCO.Err != "":
		s.refuse("whether OpenShift's Machine Config Operator owns %s can not be told, because %s", name, p.Facts.MCO.Err)
	case p.Facts.MCO.Files[name]:
		s.refuse("%s is owned by OpenShift's Machine Config Operator: change it in a MachineConfig", name)
	case elsewhere(p.Facts.OS, name) != "":
		s.refuse("%s would not outlive a reboot on this system: use %s", name, elsewhere(p.Facts.OS, name))
	case p.Facts.ReadOnly(name):
		s.refuse("%s lies on a file system that is mounted read-only", name)
	}
}

// elsewhere says what to use instead of modulesFile or sysctlFile.
func elsewhere(o host.OS, name string) string {
	if name != modulesFile && name != sysctlFile {
		return ""
	}
	return probes.KeptElsewhere(o)
}

func (p *planner) initiator(s *Step) {
	if len(s.Files) > 0 {
		return
	}
	now := p.Facts.Files[initiatorFile]
	c := FileChange{Path: initiatorFile, Create: true, mode: 0o600, random: true}
	c.after = "InitiatorName=" + initiatorPrefix(p.Facts.OS.ID) + "<random>\n"
	c.describe(FileFact{})
	s.Files = append(s.Files, c)
	if now.Exists {
		s.refuse("%s exists: the name of an initiator is never overwritten, for arrays know this node by it", initiatorFile)
	}
	p.mayWrite(s, initiatorFile, now)
}

func (p *planner) oomScore(s *Step, action, unit string) {
	i := slices.IndexFunc(p.Require.OOMScores, func(o probes.RequiredOOMScore) bool { return o.Unit == unit })
	if i < 0 {
		s.refuse("no score for %s stands in require.oomScores", unit)
		return
	}
	score := p.Require.OOMScores[i].Score
	if action == finding.SetOOMScore {
		s.OOMScore = &ScoreChange{unit, score}
	}
	if len(s.Files) > 0 || !strings.HasSuffix(unit, ".service") {
		return
	}
	name := path.Join("/etc/systemd/system", unit+".d", dropInName)
	text := ownHeader + "[Service]\nOOMScoreAdjust=" + strconv.Itoa(score) + "\n"
	if p.Facts.Files[name].Data == text {
		return
	}
	p.change(s, name, text, nil)
	s.Units = append(s.Units, UnitChange{"", "daemon-reload"})
}

// packages fills in the one transaction.
func (p *planner) packages(s *Step) {
	slices.Sort(s.Subjects)
	m := p.Facts.Manager
	s.manager, s.requests = m, s.Subjects
	if why := refusal(p.Facts.OS, p.Facts.MCO.Present, s.Subjects); why != "" {
		s.refuse("%s", why)
		return
	}
	if m == "" {
		s.refuse("no package manager the agent knows is on this host: install %s by hand", strings.Join(s.Subjects, " "))
		return
	}
	for _, name := range s.Subjects {
		// apt-get takes a trailing '-' for a removal.
		if strings.HasSuffix(name, "-") || strings.HasPrefix(name, "-") {
			s.refuse("%q is not taken as a package name", name)
		}
	}
	env := append(baseEnv(), m.env()...)
	if argv := m.refreshArgv(); argv != nil && p.Now.Sub(p.Facts.ListsAt) > listsMaxAge {
		s.Commands = append(s.Commands, Command{Argv: argv, Env: env, LimitSeconds: int(refreshLimit.Seconds()), Prepares: true})
	}
	s.Commands = append(s.Commands, Command{Argv: m.installArgv(s.Subjects), Env: env, LimitSeconds: int(packageLimit.Seconds())})
	s.Simulation = NotSimulated
	s.AfterReboot = m == Transactional
	if p.steps["dpkg"] != nil {
		s.DependsOn = append(s.DependsOn, "dpkg")
	}
	for _, id := range p.order {
		for _, f := range p.steps[id].Files {
			if isMultipathConfig(f.Path) && slices.ContainsFunc(s.Subjects, bringsMultipath) {
				// multipathd starts with its package: it must not claim disks
				// by its defaults in between.
				s.DependsOn = append(s.DependsOn, id)
			}
		}
	}
}

func bringsMultipath(pkg string) bool {
	return pkg == "multipath-tools" || pkg == "device-mapper-multipath"
}

// ordered fills in what depends on the whole, refuses what is not allowed, and
// sorts: what a vendor demands before a package, packages, files, modules,
// sysctls, units, scores.
func (p *planner) ordered() []*Step {
	if s := p.steps["packages"]; s != nil {
		p.packages(s)
	}
	steps := make([]*Step, 0, len(p.order))
	for _, id := range p.order {
		s := p.steps[id]
		if p.steps["packages"] != nil && p.comesWithPackage(s) {
			s.DependsOn = append(s.DependsOn, "packages")
		}
		p.gate(s)
		steps = append(steps, s)
	}
	slices.SortStableFunc(steps, func(a, b *Step) int {
		return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(a.ID, b.ID))
	})
	refused := map[string]bool{}
	for _, s := range steps {
		for _, id := range s.DependsOn {
			if refused[id] {
				s.refuse("it needs the step %s, which is refused", id)
			}
		}
		refused[s.ID] = s.Refused != ""
	}
	return steps
}

// comesWithPackage: a unit that does not exist yet, and the initiator's name,
// which the package makes when it is installed.
func (p *planner) comesWithPackage(s *Step) bool {
	if s.ID == "initiator-name" {
		return true
	}
	return s.Kind == finding.KindUnits && slices.ContainsFunc(s.Units, func(c UnitChange) bool {
		u, known := p.Facts.Units[c.Unit]
		return known && u.Load == "not-found"
	})
}

func rank(s *Step) int {
	switch {
	case s.ID == "dpkg":
		return 0
	case slices.ContainsFunc(s.Files, func(f FileChange) bool { return isMultipathConfig(f.Path) }):
		return 1
	case s.ID == "packages":
		return 2
	}
	return 3 + slices.Index([]string{finding.KindFiles, finding.KindModules, finding.KindSysctls, finding.KindUnits, finding.KindOOMScores}, s.Kind)
}

// gate applies what holds for steps of every kind.
func (p *planner) gate(s *Step) {
	if s.Kind != "" && !slices.Contains(p.Remedies.Allow, s.Kind) {
		s.refuse("remedies.allow does not list %s", s.Kind)
	}
	if (len(s.Commands) > 0 || len(s.Units) > 0) && !p.Facts.Systemd {
		s.refuse("systemd is not the init of this host: the step would run in the agent's pod and die with it")
	}
	if len(s.Commands) > 0 && s.Commands[0].Argv[0] == "" {
		s.refuse("modprobe is not on this host")
	}
	p.coolDown(s)
}

// coolDown keeps a step that has failed from being tried again and again, and
// one that waits for a reboot from being staged twice.
func (p *planner) coolDown(s *Step) {
	for _, r := range slices.Backward(p.Facts.Past) {
		if r.Step != s.ID || r.Digest != s.Digest() || r.Outcome == Skipped {
			continue
		}
		until := r.Ended.Add(p.Remedies.Cooldown.D())
		switch {
		case r.Outcome == Staged && r.BootID == p.Facts.OS.BootID:
			s.refuse("it was staged at %s and takes effect with the next reboot", r.Ended.UTC().Format(time.RFC3339))
		case (r.Outcome == Failed || r.Outcome == RolledBack) && p.Now.Before(until):
			s.refuse("it failed at %s (%s) and is not tried again before %s", r.Ended.UTC().Format(time.RFC3339), r.Message, until.UTC().Format(time.RFC3339))
		}
		return
	}
}
