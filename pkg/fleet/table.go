package fleet

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"k8s.io/apimachinery/pkg/util/duration"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// Style says how a text is shown.
type Style struct {
	// Colour: the output is a terminal that wants colours.
	Colour bool
	// Wide shows everything there is.
	Wide bool
}

// cell is text with the colour it is painted in, if any.
type cell struct{ colour, text string }

// paint escapes, and colours if the style has colours.
func (s Style) paint(colour, text string) string {
	text = terminal.Line(text)
	if !s.Colour || colour == "" || text == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// width counts runes, which is what a terminal's columns are for most scripts.
func width(text string) int { return utf8.RuneCountInString(terminal.Line(text)) }

// columns are the names of the probes that have a condition on any node.
func (r Report) columns() []string {
	var out []string
	for _, n := range r.Nodes {
		for _, p := range n.Probes {
			if !slices.Contains(out, p.Probe) {
				out = append(out, p.Probe)
			}
		}
	}
	slices.SortFunc(out, compareProbes)
	return out
}

// WriteTable writes the report for a person: a row a node, a column a probe.
func (r Report) WriteTable(w io.Writer, s Style) error {
	var b strings.Builder
	probes := r.columns()
	header := []cell{{text: "NODE"}, {text: "READY"}, {text: "AGENT"}}
	if s.Wide {
		header = append(header, cell{text: "VERSION"}, cell{text: "TOLD"}, cell{text: "KUBELET"})
	}
	for _, p := range probes {
		header = append(header, cell{text: strings.ToUpper(p)})
	}
	rows := [][]cell{header}
	for _, n := range r.Nodes {
		rows = append(rows, n.row(probes, s.Wide, r.Time))
	}
	widths := make([]int, len(header))
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], width(c.text))
		}
	}
	if len(r.Nodes) == 0 {
		rows = nil
		b.WriteString("no nodes\n")
	}
	for i, row := range rows {
		for j, c := range row {
			if j > 0 {
				b.WriteString("  ")
			}
			b.WriteString(s.paint(c.colour, c.text))
			if j < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[j]-width(c.text)))
			}
		}
		b.WriteByte('\n')
		if s.Wide && i > 0 {
			r.Nodes[i-1].details(&b, s, r.Time)
		}
	}
	r.rest(&b, s)
	_, err := io.WriteString(w, b.String())
	return err
}

func (n Node) row(probes []string, wide bool, now time.Time) []cell {
	row := []cell{{terminal.Bold, n.Name}, n.readyCell(), n.Agent.cell(now)}
	if wide {
		told := "-"
		if !n.Agent.Told.IsZero() {
			told = age(now, n.Agent.Told) + " ago"
		}
		row = append(row, cell{text: orDash(n.Agent.Version)}, cell{text: told}, kubeletCell(n.Kubelet))
	}
	for _, p := range probes {
		i := slices.IndexFunc(n.Probes, func(c Condition) bool { return c.Probe == p })
		if i < 0 {
			row = append(row, cell{terminal.Grey, "-"})
			continue
		}
		row = append(row, n.probeCell(n.Probes[i]))
	}
	return row
}

func kubeletCell(ready string) cell {
	switch ready {
	case "True":
		return cell{terminal.Green, "Ready"}
	case "False":
		return cell{terminal.Red, "NotReady"}
	}
	return cell{terminal.Yellow, "Unknown"}
}

func (n Node) readyCell() cell {
	if n.Ready == nil {
		return cell{terminal.Grey, "-"}
	}
	switch n.Ready.Status {
	case finding.OK:
		return n.dated(cell{terminal.Green, "True"})
	case finding.Problem:
		return n.dated(cell{terminal.Red, "False"})
	}
	return n.dated(cell{terminal.Yellow, "Unknown"})
}

func (n Node) probeCell(c Condition) cell {
	switch c.Status {
	case finding.OK:
		return n.dated(cell{terminal.Green, "ok"})
	case finding.Problem:
		return n.dated(cell{terminal.Red, c.Reason})
	}
	return n.dated(cell{terminal.Yellow, "unknown"})
}

// dated marks what nobody vouches for any more.
func (n Node) dated(c cell) cell {
	if n.Agent.Trusted() {
		return c
	}
	if c.colour == terminal.Green {
		c.colour = terminal.Yellow
	}
	return cell{c.colour, c.text + "?"}
}

func (a Agent) cell(now time.Time) cell {
	switch a.State {
	case Running:
		return cell{terminal.Green, "ok"}
	case Missing:
		return cell{terminal.Yellow, "no agent"}
	case NotRunning:
		return cell{terminal.Yellow, a.Detail}
	case Stale:
		return cell{terminal.Yellow, "stale " + age(now, a.Told)}
	case NotExpected:
		return cell{terminal.Grey, "-"}
	}
	return cell{terminal.Yellow, "unseen"}
}

// details are the lines under a node in a wide table.
func (n Node) details(b *strings.Builder, s Style, now time.Time) {
	for _, c := range n.all() {
		if c.Status == finding.OK {
			continue
		}
		colour := terminal.Red
		if c.Status == finding.Unknown {
			colour = terminal.Yellow
		}
		since := ""
		if !c.Since.IsZero() {
			since = " since " + age(now, c.Since)
		}
		fmt.Fprintf(b, "    %s %s%s: %s\n", strings.ToUpper(terminal.Line(c.Probe)), s.paint(colour, c.Reason), since, terminal.Line(c.Message))
	}
}

// rest is what stands under the table: what is wrong between nodes, what could
// not be seen, and how many of each there are.
func (r Report) rest(b *strings.Builder, s Style) {
	if len(r.DuplicateIdentities) > 0 {
		fmt.Fprintf(b, "\n%s\n", s.paint(terminal.Bold, "One identity, several nodes"))
		writeDuplicates(b, s, r.DuplicateIdentities)
	}
	if len(r.StuckVolumes) > 0 {
		fmt.Fprintf(b, "\n%s\n", s.paint(terminal.Bold, "Volumes stuck on nodes that are not Ready"))
		writeStuck(b, s, r.StuckVolumes, r.Time)
	}
	if len(r.NotChecked) > 0 {
		b.WriteByte('\n')
		for _, what := range r.NotChecked {
			fmt.Fprintf(b, "%s %s\n", s.paint(terminal.Yellow, "could not check:"), terminal.Line(what))
		}
	}
	if len(r.Nodes) > 1 {
		fmt.Fprintf(b, "\n%s\n", r.summary())
	}
}

func (r Report) summary() string {
	by := map[finding.Status]int{}
	silent := 0
	for _, n := range r.Nodes {
		by[n.Status]++
		if !n.Agent.Trusted() && n.Agent.State != NotExpected {
			silent++
		}
	}
	text := fmt.Sprintf("%s: %d with problems, %d unknown, %d ok", count(len(r.Nodes), "node"), by[finding.Problem], by[finding.Unknown], by[finding.OK])
	if n := by[finding.NotApplicable]; n > 0 {
		text += fmt.Sprintf(", %d without a host of ours", n)
	}
	if silent > 0 {
		text += fmt.Sprintf("; on %d no agent vouches for what it told (marked ?)", silent)
	}
	return text
}

func writeDuplicates(b *strings.Builder, s Style, list []Duplicate) {
	for _, d := range list {
		names := few(d.Nodes, 8)
		if s.Wide {
			names = strings.Join(d.Nodes, ", ")
		}
		fmt.Fprintf(b, "  %s %s %s\n", s.paint(terminal.Red, d.Identity), terminal.Line(d.Hash), terminal.Line(names))
	}
}

func writeStuck(b *strings.Builder, s Style, list []StuckVolume, now time.Time) {
	for i, v := range list {
		fmt.Fprintf(b, "  %s\n", s.paint(terminal.Red, v.Claim+" ("+v.Volume+") "+v.Says(now)))
		// The way out is the node's, and told once.
		if i+1 < len(list) && list[i+1].Node == v.Node {
			continue
		}
		for j, step := range v.WayOut() {
			fmt.Fprintf(b, "    %d. %s\n", j+1, terminal.Line(step))
		}
	}
}

// IdentityReport is what `kubectl hygiene identities -o json` has.
type IdentityReport struct {
	APIVersion          string      `json:"apiVersion"`
	Kind                string      `json:"kind"`
	Time                time.Time   `json:"time"`
	DuplicateIdentities []Duplicate `json:"duplicateIdentities"`
	// Compared is of how many nodes each kind of identity is known.
	Compared   map[string]int `json:"compared"`
	NotChecked []string       `json:"notChecked,omitempty"`
}

// NewIdentityReport compares the nodes.
func NewIdentityReport(known map[string]Identities, notChecked []string, now time.Time) IdentityReport {
	r := IdentityReport{APIVersion: APIVersion, Kind: "IdentityReport", Time: now.UTC().Truncate(time.Second),
		DuplicateIdentities: Duplicates(known), Compared: map[string]int{}, NotChecked: notChecked}
	if r.DuplicateIdentities == nil {
		r.DuplicateIdentities = []Duplicate{}
	}
	for _, ids := range known {
		for kind := range ids {
			r.Compared[kind]++
		}
	}
	return r
}

// ExitCode is that of the report of a fleet.
func (r IdentityReport) ExitCode() int {
	return Report{DuplicateIdentities: r.DuplicateIdentities, NotChecked: r.NotChecked}.ExitCode()
}

// WriteTable writes it for a person.
func (r IdentityReport) WriteTable(w io.Writer, s Style) error {
	var b strings.Builder
	if len(r.DuplicateIdentities) > 0 {
		fmt.Fprintf(&b, "%s\n", s.paint(terminal.Bold, "One identity, several nodes"))
		writeDuplicates(&b, s, r.DuplicateIdentities)
	} else {
		fmt.Fprintln(&b, s.paint(terminal.Green, "no identity is on two nodes"))
	}
	var kinds []string
	for kind, n := range r.Compared {
		kinds = append(kinds, fmt.Sprintf("%s of %s", kind, count(n, "node")))
	}
	slices.Sort(kinds)
	if len(kinds) > 0 {
		fmt.Fprintf(&b, "compared: %s\n", terminal.Line(strings.Join(kinds, ", ")))
	}
	for i, what := range r.NotChecked {
		if i == mostLines && !s.Wide {
			fmt.Fprintf(&b, "and %d more, see -o wide\n", len(r.NotChecked)-i)
			break
		}
		fmt.Fprintf(&b, "%s %s\n", s.paint(terminal.Yellow, "could not check:"), terminal.Line(what))
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// mostLines is how many findings of one check stand in a table that is not wide.
const mostLines = 20

// WriteJSON writes a report as one indented JSON document.
func WriteJSON(w io.Writer, report any) error {
	enc := json.NewEncoder(w)
	enc.SetIndent("", "  ")
	enc.SetEscapeHTML(false)
	return enc.Encode(report)
}

// WriteYAML writes a report as YAML.
func WriteYAML(w io.Writer, report any) error {
	data, err := yaml.Marshal(report)
	if err != nil {
		return err
	}
	_, err = w.Write(data)
	return err
}

func age(now, since time.Time) string { return duration.HumanDuration(max(0, now.Sub(since))) }

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}
