package config

import (
	"fmt"
	"maps"
	"regexp"
	"slices"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// validate tells what is impossible or contradictory in c, each objection on
// the line of the value in tree that it is about. Under an override, an
// objection to a line outside of it names the override too.
func (d *decoder) validate(c *AgentConfig, tree *node, under string) {
	tell := func(fe *probes.FieldError, told func(path string) bool) {
		line, path := tree.find(fe.Field)
		if told(path) {
			return
		}
		text := fe.Problem
		if under != "" && !within(path, under) {
			text += " (with " + under + ")"
		}
		d.bad(line, path, "%s", text)
	}
	for _, fe := range c.check() {
		tell(fe, d.told)
	}
	// One profile may contradict others in several keys: each is told, unless
	// something else is wrong with it.
	before := problems{list: slices.Clone(d.list)}
	_, contradictions := c.requirements()
	for _, fe := range contradictions {
		tell(fe, before.told)
	}
}

// checks collects objections; paths start at the top of the config.
type checks []*probes.FieldError

func (cs *checks) bad(path, format string, args ...any) {
	*cs = append(*cs, &probes.FieldError{Field: path, Problem: fmt.Sprintf(format, args...)})
}

// adopt takes over what a part found, its paths put below prefix.
func (cs *checks) adopt(prefix string, err error) {
	for _, fe := range probes.FieldErrors(err) {
		switch {
		case fe.Field == "":
			cs.bad(prefix, "%s", fe.Problem)
		case fe.Field[0] == '[':
			cs.bad(prefix+fe.Field, "%s", fe.Problem)
		default:
			cs.bad(prefix+"."+fe.Field, "%s", fe.Problem)
		}
	}
}

// The bounds of an interval: below, the agent would be the load it warns of;
// above, a condition would stay stale for longer than anyone expects.
const (
	minInterval = time.Second
	maxInterval = 24 * time.Hour
)

func (c *AgentConfig) check() []*probes.FieldError {
	var cs checks
	rules := Rules()
	cs.interval("interval", c.Interval)
	cs.report(c.Report, rules)
	for _, p := range c.Probes.List() {
		at := "probes." + p.Name()
		cs.adopt(at, p.Validate())
		g := p.General()
		if g.Interval != 0 {
			cs.interval(at+".interval", g.Interval)
		}
		if g.Required && !g.On() {
			cs.bad(at+".required", "contradicts enabled: false: a probe that is switched off is always Unknown")
		}
	}
	cs.adopt("require", c.Require.Validate())
	cs.require("require", c.Require)
	cs.profiles(&c.Sections)
	cs.mutes(c.Mute, rules)
	cs.reasons(c, rules)
	cs.remedies(c.Remedies)
	return cs
}

func (cs *checks) interval(path string, d probes.Duration) {
	if d.D() < minInterval || d.D() > maxInterval {
		cs.bad(path, "want %s to %s, not %s", probes.Duration(minInterval), probes.Duration(maxInterval), d)
	}
}

// reason objects to a word that is no reason and returns the rule if it is one.
func (cs *checks) reason(path, word string, rules map[string]finding.Rule) (finding.Rule, bool) {
	rule, ok := rules[word]
	if !ok {
		hint := "docs/reasons.md lists them"
		if len(*cs) >= maxProblems { // no more are shown
			rules = nil
		}
		if c := nearest(word, slices.Sorted(maps.Keys(rules))); c != "" {
			hint = "did you mean " + c + "?"
		}
		cs.bad(path, "there is no reason %q: %s", word, hint)
	}
	return rule, ok
}

func (cs *checks) report(r Report, rules map[string]finding.Rule) {
	for i, word := range r.ReadyReasons {
		at := fmt.Sprintf("report.readyReasons[%d]", i)
		rule, ok := finding.Rule{}, true
		if word != wordCritical {
			rule, ok = cs.reason(at, word, rules)
		}
		switch {
		case !ok:
		case rule.NeverReady:
			cs.bad(at, "%s never counts against Ready", word)
		case slices.Contains(r.ReadyReasons[:i], word):
			cs.bad(at, "%s is listed twice", word)
		}
	}
}

// words objects to unknown and repeated words of a list.
func (cs *checks) words(path string, list, known []string) {
	for i, w := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		switch {
		case !slices.Contains(known, w):
			cs.bad(at, "%q is not known: %s", w, wantOneOf(w, known))
		case slices.Contains(list[:i], w):
			cs.bad(at, "%s is listed twice", w)
		}
	}
}

func (cs *checks) mutes(mutes []Mute, rules map[string]finding.Rule) {
	type key struct{ reason, subject string }
	seen := map[key]bool{}
	for i, m := range mutes {
		at := fmt.Sprintf("mute[%d]", i)
		cs.reason(at+".reason", m.Reason, rules)
		if k := (key{m.Reason, m.Subject}); seen[k] {
			cs.bad(at, "%s is muted twice", strings.TrimSpace(m.Reason+" "+m.Subject))
		} else {
			seen[k] = true
		}
	}
}

func (cs *checks) reasons(c *AgentConfig, rules map[string]finding.Rule) {
	for _, word := range slices.Sorted(maps.Keys(c.Severity)) {
		at := "severity." + word
		cs.reason(at, word, rules)
		if s := c.Severity[word]; !slices.Contains(finding.Severities(), s) {
			cs.bad(at, "want info, warning or critical, not %q", s)
		}
	}
	for _, word := range slices.Sorted(maps.Keys(c.Hold)) {
		at := "hold." + word
		cs.reason(at, word, rules)
		for _, h := range []struct {
			key string
			d   *probes.Duration
		}{{"before", c.Hold[word].Before}, {"clear", c.Hold[word].Clear}} {
			if h.d != nil && (*h.d < 0 || h.d.D() > maxInterval) {
				cs.bad(at+"."+h.key, "want 0s to %s, not %s", probes.Duration(maxInterval), *h.d)
			}
		}
	}
}

// require adds to [probes.Require.Validate] what only shows between entries.
func (cs *checks) require(at string, r probes.Require) {
	cs.unique(at+".packages", len(r.Packages), func(i int) string { return r.Packages[i].Name })
	cs.unique(at+".units", len(r.Units), func(i int) string { return r.Units[i].Name })
	cs.unique(at+".modules", len(r.Modules), func(i int) string { return strings.ReplaceAll(r.Modules[i], "-", "_") })
	cs.unique(at+".files", len(r.Files), func(i int) string { return r.Files[i].Path })
	cs.unique(at+".oomScores", len(r.OOMScores), func(i int) string { return r.OOMScores[i].Unit })
	cs.devices(at+".devices", r.Devices)
}

// unique objects to what is listed twice: the second entry says the same again,
// or the opposite.
func (cs *checks) unique(path string, n int, name func(int) string) {
	first := make(map[string]int, n)
	for i := range n {
		k := name(i)
		if j, dup := first[k]; dup && k != "" {
			cs.bad(fmt.Sprintf("%s[%d]", path, i), "%s is listed twice: it is %s[%d] too", k, path, j)
			continue
		}
		first[k] = i
	}
}

func (cs *checks) devices(path string, list []probes.RequiredDevice) {
	byID, byMount := map[string]int{}, map[string]int{}
	for i, v := range list {
		at := fmt.Sprintf("%s[%d]", path, i)
		if v.MinSize != nil && v.MinSize.Sign() <= 0 {
			cs.bad(at+".minSize", "want more than 0, not %s", v.MinSize)
		}
		j, dup := byID[v.ID]
		switch {
		case v.ID == "":
		case !dup:
			byID[v.ID] = i
		case v.MountedAt != list[j].MountedAt && v.MountedAt != "" && list[j].MountedAt != "":
			cs.bad(at+".mountedAt", "%s[%d] wants the same device at %s: a device is required at one place", path, j, list[j].MountedAt)
			continue
		default:
			cs.bad(at, "%s is listed twice: it is %s[%d] too", v.ID, path, j)
			continue
		}
		if j, dup := byMount[v.MountedAt]; dup && v.MountedAt != "" {
			cs.bad(at+".mountedAt", "%s[%d] wants another device at %s", path, j, v.MountedAt)
			continue
		}
		byMount[v.MountedAt] = i
	}
}

var timeOfDay = regexp.MustCompile(`^([01][0-9]|2[0-3]):[0-5][0-9]$`)

func (cs *checks) remedies(r Remedies) {
	cs.words("remedies.allow", r.Allow, RemedyKinds())
	if r.Mode == ModeEnforce && len(r.Allow) == 0 {
		cs.bad("remedies.mode", "enforce with nothing in allow would change nothing: list what may be changed, of %s", strings.Join(RemedyKinds(), ", "))
	}
	if r.MaxConcurrentNodes < 1 {
		cs.bad("remedies.maxConcurrentNodes", "want 1 or more, not %d: mode: off is what stops remedies", r.MaxConcurrentNodes)
	}
	if r.FailureBudget < 1 {
		cs.bad("remedies.failureBudget", "want 1 or more, not %d: it is after how many failures remedies stop", r.FailureBudget)
	}
	if r.Cooldown < 0 {
		cs.bad("remedies.cooldown", "want 0s or more, not %s", r.Cooldown)
	}
	w := r.MaintenanceWindow
	if w == nil {
		return
	}
	const at = "remedies.maintenanceWindow"
	cs.words(at+".days", w.Days, Weekdays())
	valid := true
	for _, t := range []struct{ key, value string }{{"from", w.From}, {"to", w.To}} {
		if !timeOfDay.MatchString(t.value) {
			cs.bad(at+"."+t.key, "want a time of day from \"00:00\" to \"23:59\", not %q", t.value)
			valid = false
		}
	}
	if valid && w.From == w.To {
		cs.bad(at+".to", "is the same as from: the window would never open")
	}
	if w.TimeZone == "Local" {
		cs.bad(at+".timeZone", "want the name of a zone, such as UTC or Europe/Berlin: Local is another on each node")
	} else if _, err := time.LoadLocation(w.TimeZone); err != nil {
		cs.bad(at+".timeZone", "there is no time zone %q: want one such as UTC or Europe/Berlin", w.TimeZone)
	}
}

// selector checks the labels of one override.
func (d *decoder) selector(labels map[string]string, item *node) {
	n := item.get("nodeSelector")
	if n == nil || n.kind != yaml.MappingNode {
		return // told already: it is missing, or no mapping
	}
	if len(labels) == 0 && len(n.fields) == 0 {
		d.bad(n.line, n.path(), "selects no node: want at least one label; what holds everywhere belongs outside of overrides")
	}
	for _, f := range n.fields {
		for _, msg := range validation.IsQualifiedName(f.key) {
			d.bad(f.line, f.value.path(), "is no label name: %s", firstClause(msg))
		}
		for _, msg := range validation.IsValidLabelValue(labels[f.key]) {
			d.bad(f.line, f.value.path(), "%q is no label value: %s", labels[f.key], firstClause(msg))
		}
	}
}

// firstClause drops the examples and the regular expression that apimachinery
// adds in brackets.
func firstClause(msg string) string {
	msg, _, _ = strings.Cut(msg, " (e.g. ")
	return msg
}
