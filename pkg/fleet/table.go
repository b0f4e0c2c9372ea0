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
	terminal.Look
	// Wide shows everything there is.
	Wide bool
}

// cell is text with the colour it is painted in, if any.
type cell struct{ colour, text string }

// paint escapes, and colours if the style has colours.
func (s Style) paint(colour, text string) string {
	return s.Paint(colour, terminal.Line(text))
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
	widths := columnWidths(rows)
	if all := 2*(len(widths)-1) + sum(widths); s.Columns > 0 && all > s.Columns {
		// A column a probe has no room: what is wrong is listed.
		own := len(header) - len(probes)
		rows[0] = append(header[:own:own], cell{text: "WHAT IS WRONG"})
		for i, n := range r.Nodes {
			rows[i+1] = append(rows[i+1][:own:own], n.wrong())
		}
		widths = columnWidths(rows)
	}
	if len(r.Nodes) == 0 {
		rows = nil
		b.WriteString("no nodes\n")
	}
	for i, row := range rows {
		var line strings.Builder
		for j, c := range row {
			if j > 0 {
				line.WriteString("  ")
			}
			line.WriteString(s.paint(c.colour, c.text))
			if j < len(row)-1 {
				line.WriteString(strings.Repeat(" ", widths[j]-width(c.text)))
			}
		}
		s.line(&b, line.String(), 2*(len(row)-1)+sum(widths[:len(row)-1]))
		if s.Wide && i > 0 {
			r.Nodes[i-1].details(&b, s, r.Time)
		}
	}
	r.rest(&b, s)
	_, err := io.WriteString(w, b.String())
	return err
}

func columnWidths(rows [][]cell) []int {
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], width(c.text))
		}
	}
	return widths
}

func sum(list []int) (all int) {
	for _, n := range list {
		all += n
	}
	return all
}

// line writes one line, in as many rows as it takes.
func (s Style) line(b *strings.Builder, text string, indent int) {
	b.WriteString(s.Wrap(text, indent) + "\n")
}

// wrong lists the probes that do not say that all is well.
func (n Node) wrong() cell {
	out := cell{terminal.Grey, "-"}
	var list []string
	for _, p := range n.Probes {
		c := n.probeCell(p)
		switch {
		case p.Status != finding.OK:
			list = append(list, p.Probe+" "+c.text)
			if out.colour != terminal.Red {
				out.colour = c.colour
			}
		case len(list) == 0:
			out = c
		}
	}
	if len(list) > 0 {
		out.text = strings.Join(list, ", ")
	}
	return out
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
		s.line(b, fmt.Sprintf("    %s %s%s: %s", strings.ToUpper(terminal.Line(c.Probe)), s.paint(colour, c.Reason), since, terminal.Line(c.Message)), 6)
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
			s.line(b, s.paint(terminal.Yellow, "could not check:")+" "+terminal.Line(what), 2)
		}
	}
	if len(r.Nodes) > 1 {
		b.WriteByte('\n')
		s.line(b, r.summary(), 2)
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
		s.line(b, fmt.Sprintf("  %s %s %s", s.paint(terminal.Red, d.Identity), terminal.Line(d.Hash), terminal.Line(names)), 4)
	}
}

func writeStuck(b *strings.Builder, s Style, list []StuckVolume, now time.Time) {
	for i, v := range list {
		s.line(b, "  "+s.paint(terminal.Red, v.Claim+" ("+v.Volume+") "+v.Says(now)), 4)
		// The way out is the node's, and told once.
		if i+1 < len(list) && list[i+1].Node == v.Node {
			continue
		}
		for j, step := range v.WayOut() {
			s.line(b, fmt.Sprintf("    %d. %s", j+1, terminal.Line(step)), 7)
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
		s.line(&b, "compared: "+terminal.Line(strings.Join(kinds, ", ")), 2)
	}
	for i, what := range r.NotChecked {
		if i == mostLines && !s.Wide {
			fmt.Fprintf(&b, "and %d more, see -o wide\n", len(r.NotChecked)-i)
			break
		}
		s.line(&b, s.paint(terminal.Yellow, "could not check:")+" "+terminal.Line(what), 2)
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
