package distros

import (
	"cmp"
	"errors"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/remedy"
)

// String is what the agent says, in full.
func (j judged) String() string {
	var b strings.Builder
	fmt.Fprintf(&b, "class %s: %s\n", j.os.Class, j.os.Why)
	for _, r := range j.reports {
		fmt.Fprintf(&b, "%s %s: %s\n", r.Probe, r.Status, r.Summary)
		for _, f := range r.Findings {
			fmt.Fprintf(&b, "  %s %s: %s\n", f.Severity, strings.TrimSpace(f.Reason+" "+f.Subject), f.Message)
			if f.Remedy != nil {
				fmt.Fprintf(&b, "    remedy: %s %s\n", f.Remedy.Action, f.Remedy.Subject)
			}
		}
		for _, err := range unjoin(r.Err) {
			fmt.Fprintf(&b, "  error: %v\n", err)
		}
	}
	if j.source != "" {
		fmt.Fprintf(&b, "from files: %s\n", j.source)
	}
	for _, s := range j.plan.Steps {
		fmt.Fprintf(&b, "step %s", s.ID)
		if s.Refused != "" {
			fmt.Fprintf(&b, " refused: %s", s.Refused)
		}
		b.WriteByte('\n')
		for _, c := range s.Commands {
			fmt.Fprintf(&b, "  $ %s\n", strings.Join(c.Argv, " "))
		}
		for _, f := range s.Files {
			fmt.Fprintf(&b, "  file %s\n", f.Path)
		}
		for _, u := range s.Units {
			fmt.Fprintf(&b, "  unit %s %s\n", u.Do, u.Unit)
		}
	}
	return b.String()
}

func unjoin(err error) []error {
	var joined interface{ Unwrap() []error }
	if errors.As(err, &joined) {
		return joined.Unwrap()
	}
	if err != nil {
		return []error{err}
	}
	return nil
}

const head = `# Distributions

What the agent takes each distribution for, by which names it knows what it looks
for there, and what it advises where something is missing. This page is generated:
[test/distros](../test/distros/testdata) holds what each distribution is like, every
fact with the package, the file of a public repository or the document it is from;
the real probes and the real planner run over hosts made of those facts
(` + "`go test ./test/distros -update`" + `, and read what changed), and what they answer
stands here, and in full in each folder's answers.txt. Nothing of it is a run of the
distribution itself: that is done on Debian only ([test/e2e](../test/e2e)).

Nine facts are asked of each: its os-release, how the system is managed, what installs
packages, what keeps the time, iSCSI, multipath, NFS, what installs updates, and the
kubelet. One that has no source is *not verified* and does not count; the agent's
answers about it are left out.

`

const legend = `
The class decides what is advised: on *mutable* and *transactional* systems packages are
installed (on the latter into the next snapshot, for the next boot), on *ostree* and
*image* systems never. Programs are looked for by path where there is no package to ask
for. Where several units are named, one of them is enough. Not applicable is what the
named probes answer while nothing is required of the host; all others answer OK.
`

const unverified = "*not verified*"

// document is docs/distributions.md.
func document(all []answers) string {
	var b strings.Builder
	b.WriteString(head)
	verified, asked := 0, 0
	for _, a := range all {
		v, n := a.count()
		verified, asked = verified+v, asked+n
	}
	fmt.Fprintf(&b, "%d systems (RHCOS is two: until 4.18, and since it is layered on RHEL), %d of %d facts\nverified.\n\n", len(all), verified, asked)
	b.WriteString("| distribution | class | a missing package | time | iSCSI | multipath | NFS | updates | kubelet: configuration, root | not applicable | verified |\n")
	b.WriteString("|---|---|---|---|---|---|---|---|---|---|---|\n")
	for _, a := range all {
		b.WriteString("| " + strings.Join(a.row(), " | ") + " |\n")
	}
	b.WriteString(legend)
	for _, a := range all {
		a.section(&b)
	}
	return b.String()
}

func (a answers) row() []string {
	v, n := a.count()
	cells := []string{
		fmt.Sprintf("[%s](#%s)", a.Name, anchor(a.Name)),
		string(a.full.os.Class),
		a.install(),
	}
	for _, c := range a.components() {
		cells = append(cells, a.cell(c))
	}
	kubelet := unverified
	if a.Kubelet.verified() {
		kubelet = code(a.full.kubelet.Flags.Last("config")) + ", " + code(a.full.kubelet.RootDir)
		if a.full.kubelet.OwnRoot {
			kubelet += " (in a container: asked through the API server)"
		}
	}
	return append(cells, kubelet, cmp.Or(strings.Join(a.with(finding.NotApplicable), ", "), "-"), fmt.Sprintf("%d of %d", v, n))
}

// install is what the planner would do about a missing package.
func (a answers) install() string {
	if !a.Packages.verified() {
		return unverified
	}
	if a.bare.install.Refused != "" {
		return "never: " + probes.HowToBring(a.bare.os, "it")
	}
	argv := a.bare.install.Commands[len(a.bare.install.Commands)-1].Argv
	if slices.Contains(argv, "pkg") {
		return code(path.Base(argv[0]) + " pkg install")
	}
	return code(path.Base(argv[0]) + " install")
}

// cell is one component as the agent knows it here.
func (a answers) cell(c component) string {
	if !c.verified() {
		return unverified
	}
	if c.capability == "" {
		return a.updates()
	}
	if c.None {
		return "none"
	}
	var parts []string
	f, missing := a.bare.finding("packages", "PackageMissing", c.capability)
	switch {
	case c.BuiltIn != "":
		parts = append(parts, c.BuiltIn)
	case missing && a.Packages.Manager != "":
		parts = append(parts, code(f.Remedy.Subject))
	case missing:
		parts = append(parts, "an extension")
	case c.Package != "" && a.Packages.Manager != "":
		parts = append(parts, code(c.Package))
	default:
		parts = append(parts, "in the image")
	}
	var units []string
	for _, u := range c.Units {
		units = append(units, code(u))
	}
	if len(units) > 0 {
		parts = append(parts, strings.Join(units, ", "))
	}
	if c.capability == "time" && a.OtherTime.verified() {
		parts = append(parts, "or "+code(a.OtherTime.Package)+": "+code(a.OtherTime.Units[0]))
	}
	if len(units) == 0 && c.BuiltIn == "" && len(c.Programs) > 0 {
		parts = append(parts, code(c.Programs[0]))
	}
	if c.InitiatorName != "" {
		parts = append(parts, code(c.InitiatorName))
	}
	return strings.Join(parts, "; ")
}

// updates is what the probe says installs them.
func (a answers) updates() string {
	r := a.full.report("updates")
	if r.Status == finding.NotApplicable {
		return "not on the host"
	}
	summary, _, _ := strings.Cut(r.Summary, ";")
	return strings.TrimSuffix(summary, " installs security updates")
}

func (a answers) with(s finding.Status) []string {
	var names []string
	for _, r := range a.plain.reports {
		if r.Status == s {
			names = append(names, r.Probe)
		}
	}
	return names
}

func (a answers) section(b *strings.Builder) {
	fmt.Fprintf(b, "\n## %s\n\n", a.Name)
	fmt.Fprintf(b, "Class %s: %s.", a.full.os.Class, a.full.os.Why)
	if a.Kubelet.verified() {
		fmt.Fprintf(b, " Kubelet: %s", a.Kubelet.How)
		if a.Kubelet.Unit != "" {
			fmt.Fprintf(b, ", %s", code(a.Kubelet.Unit))
		}
		b.WriteByte('.')
	}
	if where := probes.KeptElsewhere(a.full.os); where != "" {
		fmt.Fprintf(b, " Modules and sysctls for every boot: %s.", where)
	}
	b.WriteByte('\n')
	fmt.Fprintf(b, "\nWhere the package NAME is missing: %s.\n", advice(a.bare.install))
	if len(a.NotVerified) > 0 {
		b.WriteString("\nNot verified:\n\n")
		for _, c := range []string{"osRelease", "system", "packages", "time", "iscsi", "multipath", "nfs", "updates", "kubelet"} {
			if why := a.NotVerified[c]; why != "" {
				fmt.Fprintf(b, "- %s: %s\n", c, why)
			}
		}
	}
	fmt.Fprintf(b, "\nSources ([facts.yaml](../test/distros/testdata/%s/facts.yaml) says which is of what):\n\n", a.dir)
	for _, name := range a.sourceNames() {
		fmt.Fprintf(b, "- %s\n", a.Sources[name])
	}
}

func advice(s remedy.Step) string {
	if s.Refused != "" {
		return s.Refused
	}
	var lines []string
	for _, c := range s.Commands {
		lines = append(lines, code(strings.Join(c.Argv, " ")))
	}
	return strings.Join(lines, ", then ")
}

func (s source) String() string {
	var text string
	switch {
	case s.Package != "":
		text = fmt.Sprintf("package %s of %s", s.Package, s.Of)
		if s.Path != "" {
			text += ", " + s.Path
		}
	case s.Repository != "":
		text = fmt.Sprintf("[%s %s](https://github.com/%s/blob/%s/%s)", s.Repository, s.Path, s.Repository, s.Commit, s.Path)
	default:
		text = "<" + s.Document + ">"
	}
	if s.Says != "" {
		text += ": " + s.Says
	}
	return text
}

func code(s string) string { return "`" + s + "`" }

// anchor is what a heading's link is called on GitHub.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '-':
			return r
		case r >= 'A' && r <= 'Z':
			return r + 'a' - 'A'
		case r == ' ':
			return '-'
		}
		return -1
	}, heading)
}
