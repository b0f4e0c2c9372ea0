package config

import (
	"embed"
	"fmt"
	"maps"
	"reflect"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"

	"github.com/hosthygiene/agent/pkg/probes"
)

// Profile is what one storage system needs of a host: a section of the form of
// require, and where that is written.
type Profile struct {
	// Description says in a sentence what it is for.
	Description string `json:"description,omitempty"`
	// Sources are where the requirements come from.
	Sources []string `json:"sources,omitempty"`
	probes.Require
}

//go:embed profiles/*.yaml
var profileFiles embed.FS

// StorageProfiles are the names of the profiles that come with the agent.
func StorageProfiles() []string {
	entries, err := profileFiles.ReadDir("profiles")
	if err != nil {
		return nil // embedded at build time: it can not be missing
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = strings.TrimSuffix(e.Name(), ".yaml")
	}
	return names
}

// BuiltinProfile reads one of [StorageProfiles].
func BuiltinProfile(name string) (Profile, error) {
	file := "profiles/" + name + ".yaml"
	data, err := profileFiles.ReadFile(file)
	if err != nil {
		return Profile{}, fmt.Errorf("there is no storage profile %q: %w", name, err)
	}
	return parseProfile(file, data)
}

// parseProfile reads what may also stand in a config under profiles.NAME.
func parseProfile(name string, data []byte) (Profile, error) {
	var p Profile
	d := decoder{}
	if !d.isText(data) {
		return p, d.err(name)
	}
	doc := d.yaml(data)
	if doc == nil {
		return p, d.err(name)
	}
	b := builder{open: map[*yaml.Node]bool{}}
	root := b.build(doc, nil, "", -1, 0)
	d.problems = b.problems
	if root != nil && !b.tooMany {
		d.decode(root, reflect.ValueOf(&p).Elem())
		var cs checks
		cs.adopt("", p.Require.Validate())
		cs.require("", p.Require)
		for _, fe := range cs {
			line, path := root.find(strings.TrimPrefix(fe.Field, "."))
			d.bad(line, path, "%s", fe.Problem)
		}
	}
	return p, d.err(name)
}

// profile returns a profile that storageProfiles may name.
func (s *Sections) profile(name string) (Profile, error) {
	if p, ok := s.Profiles[name]; ok {
		return p, nil
	}
	return BuiltinProfile(name)
}

// profileName is what a profile may be called: it becomes part of messages.
var profileName = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

func (cs *checks) profiles(s *Sections) {
	known := StorageProfiles()
	for _, name := range slices.Sorted(maps.Keys(s.Profiles)) {
		at := below("profiles", name)
		switch {
		case slices.Contains(known, name):
			cs.bad(at, "comes with the agent: give a profile of your own another name")
		case !profileName.MatchString(name):
			cs.bad(at, "is no name for a profile: want lower-case letters, digits and '-', at most 63")
		}
		cs.adopt(at, s.Profiles[name].Require.Validate())
		cs.require(at, s.Profiles[name].Require)
	}
	cs.words("storageProfiles", s.StorageProfiles, append(known, slices.Sorted(maps.Keys(s.Profiles))...))
}

// requirements is what the host must have by the config's own require section
// and by all its storage profiles. What contradicts another is told where the
// later of the two is named, and the earlier one stands.
func (s *Sections) requirements() (probes.Require, []*probes.FieldError) {
	if len(s.StorageProfiles)+len(s.Probes.Multipath.Settings) == 0 {
		return s.Require, nil
	}
	m := merging{seen: map[string]mark{}, sysctls: map[string]string{}}
	m.add("require", "require", s.Require)
	for i, name := range s.StorageProfiles {
		if slices.Contains(s.StorageProfiles[:i], name) {
			continue // told already
		}
		p, err := s.profile(name)
		if err != nil {
			continue // told already
		}
		m.add(fmt.Sprintf("storageProfiles[%d]", i), name, p.Require)
	}
	for _, key := range slices.Sorted(maps.Keys(s.Probes.Multipath.Settings)) {
		m.who, m.path = "probes.multipath.settings", below("probes.multipath.settings", key)
		value := s.Probes.Multipath.Settings[key]
		if have, ok := m.result.Multipath.Defaults[key]; ok && !probes.SameMultipathValue(have, value) {
			m.contradict(below("multipath.defaults", key), have, value)
		}
	}
	return m.result, m.errs
}

// merging lays requirements over one another. Nothing it is given is changed.
type merging struct {
	result probes.Require
	seen   map[string]mark
	// sysctls is how each is spelled in the result: with dots or with slashes.
	sysctls map[string]string
	// who is being merged, and where in the config it is named.
	who, path string
	errs      checks
}

// mark is the place in its list of what a key stands for, and who required it
// first.
type mark struct {
	place int
	owner string
}

// first reports whether nobody has required the key yet, and notes who does.
func (m *merging) first(key string, place int) bool {
	if _, ok := m.seen[key]; ok {
		return false
	}
	m.seen[key] = mark{place, m.who}
	return true
}

func (m *merging) contradict(key, have, value string) {
	m.errs.bad(m.path, "%s contradicts %s: %s must be %s for the one and %s for the other", m.who, m.seen[key].owner, key, oneLine(value), oneLine(have))
}

func (m *merging) add(path, who string, r probes.Require) {
	m.path, m.who = path, who
	for _, p := range r.Packages {
		m.pkg(p)
	}
	for _, d := range r.Devices {
		key := below("devices", d.ID)
		if m.first(key, len(m.result.Devices)) {
			m.result.Devices = append(m.result.Devices, d)
		} else if have := m.result.Devices[m.seen[key].place]; describe(have) != describe(d) {
			m.contradict(key, describe(have), describe(d))
		}
	}
	for _, u := range r.Units {
		m.unit(u)
	}
	for _, name := range r.Modules {
		if m.first("modules."+strings.ReplaceAll(name, "-", "_"), len(m.result.Modules)) {
			m.result.Modules = append(m.result.Modules, name)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(r.Sysctls)) {
		m.sysctl(name, r.Sysctls[name])
	}
	for _, f := range r.Files {
		m.file(f)
	}
	for _, o := range r.OOMScores {
		key := below("oomScores", o.Unit)
		if m.first(key, len(m.result.OOMScores)) {
			m.result.OOMScores = append(m.result.OOMScores, o)
		} else if have := m.result.OOMScores[m.seen[key].place]; have != o {
			m.contradict(key, fmt.Sprint(have.Score), fmt.Sprint(o.Score))
		}
	}
	m.multipath(r.Multipath)
}

func describe(d probes.RequiredDevice) string {
	var s []string
	if d.Count > 1 {
		s = append(s, fmt.Sprintf("%d of them", d.Count))
	}
	if d.MinSize != nil {
		s = append(s, "at least "+d.MinSize.String())
	}
	if d.MountedAt != "" {
		s = append(s, "mounted at "+d.MountedAt)
	}
	if d.FSType != "" {
		s = append(s, "with "+d.FSType)
	}
	if len(s) == 0 {
		return "there"
	}
	return strings.Join(s, ", ")
}

func (m *merging) pkg(p probes.RequiredPackage) {
	at := below("packages", p.Name)
	if m.first(at, len(m.result.Packages)) {
		p.Names = maps.Clone(p.Names)
		m.result.Packages = append(m.result.Packages, p)
		for id := range p.Names {
			m.first(below(at+".names", id), 0)
		}
		return
	}
	have := &m.result.Packages[m.seen[at].place]
	for _, id := range slices.Sorted(maps.Keys(p.Names)) {
		key := below(at+".names", id)
		switch {
		case m.first(key, 0):
			if have.Names == nil {
				have.Names = map[string]string{}
			}
			have.Names[id] = p.Names[id]
		case have.Names[id] != p.Names[id]:
			m.contradict(key, have.Names[id], p.Names[id])
		}
	}
}

// unit merges what is asked of one unit. Without a word about active, a unit
// that may be disabled may also be stopped.
func (m *merging) unit(u probes.RequiredUnit) {
	at := below("units", u.Name)
	if m.first(at, len(m.result.Units)) {
		m.seen[at+".enabled"], m.seen[at+".active"] = mark{owner: m.who}, mark{owner: m.who}
		m.result.Units = append(m.result.Units, u)
		return
	}
	have := &m.result.Units[m.seen[at].place]
	mustRun := have.MustRun() || u.MustRun()
	switch {
	case have.Enabled == nil:
		have.Enabled, m.seen[at+".enabled"] = u.Enabled, mark{owner: m.who}
	case u.Enabled != nil && *u.Enabled != *have.Enabled:
		m.contradict(at+".enabled", fmt.Sprint(*have.Enabled), fmt.Sprint(*u.Enabled))
		return
	}
	if stopped(*have) && u.MustRun() || stopped(u) && have.MustRun() {
		m.contradict(at+".active", fmt.Sprint(have.MustRun()), fmt.Sprint(u.MustRun()))
		return
	}
	if have.Active == nil {
		have.Active, m.seen[at+".active"] = u.Active, mark{owner: m.who}
	}
	if mustRun && !have.MustRun() {
		have.Active = &mustRun
	}
}

func stopped(u probes.RequiredUnit) bool { return u.Active != nil && !*u.Active }

func (m *merging) sysctl(name, value string) {
	spelled, seen := m.sysctls[probes.SysctlPath(name)]
	if !seen {
		m.sysctls[probes.SysctlPath(name)] = name
		spelled = name
	}
	key := below("sysctls", spelled)
	if m.first(key, 0) {
		if m.result.Sysctls == nil {
			m.result.Sysctls = map[string]string{}
		}
		m.result.Sysctls[name] = value
		return
	}
	have := m.result.Sysctls[spelled]
	met, ok := probes.MeetSysctl(have, value)
	if !ok {
		m.contradict(key, have, value)
		return
	}
	m.result.Sysctls[spelled] = met
}

func (m *merging) file(f probes.RequiredFile) {
	key := below("files", f.Path)
	if m.first(key, len(m.result.Files)) {
		m.result.Files = append(m.result.Files, f)
		return
	}
	have := &m.result.Files[m.seen[key].place]
	if have.OnlyIfMissing && !f.OnlyIfMissing {
		have.Content, have.OnlyIfMissing = f.Content, false
	}
	switch {
	case have.Content != f.Content && !f.OnlyIfMissing: // any will do otherwise
		m.errs.bad(m.path, "%s contradicts %s: %s has another content for the one than for the other", m.who, m.seen[key].owner, key)
	case have.Mode != "" && f.Mode != "" && have.Mode != f.Mode:
		m.contradict(key, "of mode "+have.Mode, "of mode "+f.Mode)
	case have.Owner != "" && f.Owner != "" && have.Owner != f.Owner:
		m.contradict(key, "owned by "+have.Owner, "owned by "+f.Owner)
	default:
		if have.Mode == "" {
			have.Mode = f.Mode
		}
		if have.Owner == "" {
			have.Owner = f.Owner
		}
		if len(have.Distributions) == 0 || len(f.Distributions) == 0 {
			have.Distributions = nil // on all
			return
		}
		for _, id := range f.Distributions {
			if !slices.Contains(have.Distributions, id) {
				have.Distributions = append(slices.Clone(have.Distributions), id)
			}
		}
	}
}

func (m *merging) multipath(r probes.RequiredMultipath) {
	for _, key := range slices.Sorted(maps.Keys(r.Defaults)) {
		if m.result.Multipath.Defaults == nil {
			m.result.Multipath.Defaults = map[string]string{}
		}
		m.setting(m.result.Multipath.Defaults, "multipath.defaults", key, r.Defaults[key])
	}
	for _, d := range r.Devices {
		at := fmt.Sprintf("multipath.devices[%s %s]", d.Vendor, d.Product)
		if m.first(at, len(m.result.Multipath.Devices)) {
			m.result.Multipath.Devices = append(m.result.Multipath.Devices,
				probes.RequiredMultipathDevice{Vendor: d.Vendor, Product: d.Product, Settings: map[string]string{}})
		}
		into := m.result.Multipath.Devices[m.seen[at].place].Settings
		for _, key := range slices.Sorted(maps.Keys(d.Settings)) {
			m.setting(into, at, key, d.Settings[key])
		}
	}
}

func (m *merging) setting(into map[string]string, at, key, value string) {
	switch {
	case m.first(below(at, key), 0):
		into[key] = value
	case !probes.SameMultipathValue(into[key], value):
		m.contradict(below(at, key), into[key], value)
	}
}
