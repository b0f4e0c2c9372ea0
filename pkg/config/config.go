// Package config is the typed AgentConfig: its defaults, strict decoding that
// tells every mistake with its line, overrides by the node's labels, and a
// watch that reloads it.
//
// A config is decoded in three steps. [Parse] turns the YAML into a tree whose
// values know their line and path; the tree is held against the Go types; and
// what was decoded is validated, each objection going back to the line of the
// value it is about. Overrides are merged on the tree, not on the structs, so
// that a mistake in one still points at its own line.
package config

import (
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

// What apiVersion and kind must say.
const (
	APIVersion = "hosthygiene.io/v1alpha1"
	Kind       = "AgentConfig"
)

// AgentConfig is what is in force on one node: the file, the overrides that
// select the node, and the defaults for everything else.
type AgentConfig struct {
	// APIVersion is hosthygiene.io/v1alpha1.
	APIVersion string `json:"apiVersion"`
	// Kind is AgentConfig.
	Kind string `json:"kind"`
	Sections
}

// Sections are the parts that an override may change.
type Sections struct {
	// Interval is how often a probe runs when nothing wakes it earlier; where it
	// is a minute or more, updates and kubelet every 15 minutes at most while all is
	// well with them.
	Interval probes.Duration `json:"interval"`
	// Report says what is written to the cluster.
	Report Report `json:"report"`
	// Probes holds the settings of each probe.
	Probes probes.Settings `json:"probes"`
	// Require is what this host must have.
	Require probes.Require `json:"require,omitzero"`
	// StorageProfiles names the storage systems this node serves: what they need
	// of it is required beside what require says. They come with the agent
	// (docs/profiles.md) or stand under profiles.
	StorageProfiles []string `json:"storageProfiles,omitempty"`
	// Profiles are further storage profiles, by the name storageProfiles has for
	// them, each of the form of require.
	Profiles map[string]Profile `json:"profiles,omitempty"`
	// Mute silences findings: they are still shown, marked muted, and do not
	// count.
	Mute []Mute `json:"mute,omitempty"`
	// Severity gives reasons another severity than their own.
	Severity map[string]finding.Severity `json:"severity,omitempty"`
	// Hold gives reasons other hold times than their own.
	Hold map[string]Hold `json:"hold,omitempty"`
	// Remedies says what the agent may repair, when, and on how many nodes.
	Remedies Remedies `json:"remedies"`
}

// Report says what is written to the cluster.
type Report struct {
	// Conditions: off deletes the agent's own Node conditions and writes none.
	Conditions Switch `json:"conditions"`
	// Events: off writes none.
	Events Switch `json:"events"`
	// ReadyReasons is what makes the condition hosthygiene.io/Ready False:
	// critical, or a list of reasons.
	ReadyReasons ReadyReasons `json:"readyReasons"`
}

// Switch is written as on or off.
type Switch bool

// The two positions.
const (
	On  Switch = true
	Off Switch = false
)

// String is the form of the config.
func (s Switch) String() string {
	if s {
		return "on"
	}
	return "off"
}

// MarshalJSON implements json.Marshaler.
func (s Switch) MarshalJSON() ([]byte, error) { return json.Marshal(s.String()) }

// UnmarshalJSON takes on and off, and the other spellings of a YAML 1.1
// boolean: a tool that rewrote the file may have turned a bare on into true.
func (s *Switch) UnmarshalJSON(data []byte) error {
	word := strings.Trim(string(data), `"`)
	on, ok := boolWord(word)
	if !ok {
		return fmt.Errorf(`want "on" or "off", not %q`, word)
	}
	*s = Switch(on)
	return nil
}

// boolWord reads the words YAML 1.1 has for booleans.
func boolWord(s string) (value, ok bool) {
	switch strings.ToLower(s) {
	case "true", "yes", "on":
		return true, true
	case "false", "no", "off":
		return false, true
	}
	return false, false
}

// ReadyReasons is what makes hosthygiene.io/Ready False: reasons, and the word
// critical for every critical finding. In the config it is that word alone or a
// list.
type ReadyReasons []string

const wordCritical = "critical"

// Match reports whether a finding makes Ready False. Findings that are muted or
// mere information never do; [finding.Rule.NeverReady] is the caller's to ask.
func (r ReadyReasons) Match(f finding.Finding) bool {
	return f.Counts() && (f.Severity == finding.Critical && slices.Contains(r, wordCritical) || slices.Contains(r, f.Reason))
}

// MarshalJSON implements json.Marshaler.
func (r ReadyReasons) MarshalJSON() ([]byte, error) {
	if len(r) == 1 && r[0] == wordCritical {
		return json.Marshal(wordCritical)
	}
	return json.Marshal(append([]string{}, r...))
}

// UnmarshalJSON implements json.Unmarshaler.
func (r *ReadyReasons) UnmarshalJSON(data []byte) error {
	var list []string
	if json.Unmarshal(data, &list) == nil {
		*r = list
		return nil
	}
	var word string
	if json.Unmarshal(data, &word) == nil && word == wordCritical {
		*r = ReadyReasons{word}
		return nil
	}
	return fmt.Errorf("want critical, or a list of reasons such as [FilesystemReadOnly, AllPathsFailed], not %s", data)
}

// Mute silences the findings of one reason, or of one subject of it.
type Mute struct {
	// Reason of the findings.
	Reason string `json:"reason"`
	// Subject they are about; without it every subject of the reason is muted.
	Subject string `json:"subject,omitempty"`
	// Until ends it; without it there is no end.
	Until time.Time `json:"until,omitzero"`
	// Because says why, for whoever finds it muted.
	Because string `json:"because,omitempty"`
}

// Match reports whether the finding is muted by m at the given time.
func (m Mute) Match(f finding.Finding, now time.Time) bool {
	return m.Reason == f.Reason && (m.Subject == "" || m.Subject == f.Subject) &&
		(m.Until.IsZero() || now.Before(m.Until))
}

// Muted returns the mute that silences a finding at the given time, or nil.
func (s *Sections) Muted(f finding.Finding, now time.Time) *finding.Mute {
	for _, m := range s.Mute {
		if m.Match(f, now) {
			return &finding.Mute{Until: m.Until, Because: m.Because}
		}
	}
	return nil
}

// Hold is how long a problem must last before it is told and be gone before it
// is cleared. What is not given stays as the reason's rule has it.
type Hold struct {
	// Before is how long the problem must last before it is told.
	Before *probes.Duration `json:"before,omitempty"`
	// Clear is how long it must be gone before it is cleared.
	Clear *probes.Duration `json:"clear,omitempty"`
}

// HoldFor returns the hold times in force for a rule.
func (s *Sections) HoldFor(rule finding.Rule) (before, clear time.Duration) {
	before, clear = rule.HoldBefore, rule.HoldClear
	h := s.Hold[rule.Reason]
	if h.Before != nil {
		before = h.Before.D()
	}
	if h.Clear != nil {
		clear = h.Clear.D()
	}
	return before, clear
}

// SeverityFor returns the severity a finding has under this config.
func (s *Sections) SeverityFor(f finding.Finding) finding.Severity {
	if sev, ok := s.Severity[f.Reason]; ok {
		return sev
	}
	return f.Severity
}

// IntervalFor returns how often a probe runs when nothing wakes it earlier and all
// is well.
func (s *Sections) IntervalFor(p probes.Probe) time.Duration {
	if own := p.General().Interval; own > 0 {
		return own.D()
	}
	every := s.Interval.D()
	if p.Rarely() && every >= time.Minute { // who asks for less means all of them
		return max(every, rarely)
	}
	return every
}

// rarely is the shortest interval of a probe that sees nearly all by being woken,
// and for which the rest is a matter of hours, while it has nothing to tell.
const rarely = 15 * time.Minute

// Remedies says what the agent may repair, when, and on how many nodes at once.
type Remedies struct {
	// Mode: off does nothing, plan tells what would be done, enforce does it.
	// Enforce also needs the agent's own flag --allow-remedies.
	Mode Mode `json:"mode"`
	// Allow names the kinds of things that may be changed; without it none.
	Allow []string `json:"allow,omitempty"`
	// MaintenanceWindow is when; without it at any time.
	MaintenanceWindow *MaintenanceWindow `json:"maintenanceWindow,omitempty"`
	// MaxConcurrentNodes is how many nodes may be repaired at once.
	MaxConcurrentNodes int `json:"maxConcurrentNodes"`
	// FailureBudget is after how many failures the whole fleet stops.
	FailureBudget int `json:"failureBudget"`
	// Cooldown is how long a step that failed is not tried again on that node.
	Cooldown probes.Duration `json:"cooldown"`
	// RequireNodeReady leaves a node alone that is NotReady; without it remedies
	// may be what makes it Ready. Nodes that are cordoned or being rebooted are
	// always left alone.
	RequireNodeReady bool `json:"requireNodeReady"`
}

// Mode is how far remedies go.
type Mode string

// The modes, from harmless to effective.
const (
	ModeOff     Mode = "off"
	ModePlan    Mode = "plan"
	ModeEnforce Mode = "enforce"
)

// UnmarshalJSON takes the modes, and false for off: a tool that rewrote the
// file as YAML 1.1 has turned a bare off into false.
func (m *Mode) UnmarshalJSON(data []byte) error {
	word := strings.Trim(string(data), `"`)
	if word == "false" {
		word = string(ModeOff)
	}
	switch Mode(word) {
	case ModeOff, ModePlan, ModeEnforce:
		*m = Mode(word)
		return nil
	}
	return fmt.Errorf("want off, plan or enforce, not %q", word)
}

// RemedyKinds are the words remedies.allow takes.
func RemedyKinds() []string { return finding.Kinds() }

// MaintenanceWindow is when remedies may act.
type MaintenanceWindow struct {
	// Days of the week, Mon to Sun, on which it opens; without it every day.
	Days []string `json:"days,omitempty"`
	// From is the time of day it opens, such as "02:00".
	From string `json:"from"`
	// To is the time of day it closes; before From means the next day.
	To string `json:"to"`
	// TimeZone is an IANA name such as Europe/Berlin; without it UTC.
	TimeZone string `json:"timeZone,omitempty"`
}

// Weekdays are the words a maintenance window takes.
func Weekdays() []string { return []string{"Mon", "Tue", "Wed", "Thu", "Fri", "Sat", "Sun"} }

// Default is the config of an agent that was given none.
func Default() *AgentConfig {
	return &AgentConfig{APIVersion: APIVersion, Kind: Kind, Sections: Sections{
		Interval: probes.Duration(time.Minute),
		Report:   Report{Conditions: On, Events: On, ReadyReasons: ReadyReasons{wordCritical}},
		Probes:   probes.Defaults(),
		Remedies: Remedies{
			Mode:               ModePlan,
			MaxConcurrentNodes: 1,
			FailureBudget:      3,
			Cooldown:           probes.Duration(30 * time.Minute),
			RequireNodeReady:   true,
		},
	}}
}

// Rules returns every rule of every probe by its reason.
func Rules() map[string]finding.Rule {
	rules := map[string]finding.Rule{}
	for _, p := range probes.Defaults().List() {
		for _, r := range p.Rules() {
			rules[r.Reason] = r
		}
	}
	return rules
}
