package report

import (
	"encoding/xml"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
	"github.com/hosthygiene/agent/pkg/probes"
	"github.com/hosthygiene/agent/pkg/terminal"
)

// HostReport is the outcome of one pass over one host, as `check -o json` has it.
type HostReport struct {
	APIVersion   string        `json:"apiVersion"`
	Kind         string        `json:"kind"`
	Node         string        `json:"node"`
	Time         time.Time     `json:"time"`
	AgentVersion string        `json:"agentVersion"`
	Host         HostInfo      `json:"host"`
	Probes       []ProbeReport `json:"probes"`
}

// HostInfo says what kind of host it is.
type HostInfo struct {
	OS        string `json:"os"`
	OSVersion string `json:"osVersion"`
	OSClass   string `json:"osClass"`
	Kernel    string `json:"kernel"`
	Init      string `json:"init"`
}

// ProbeReport is one probe's part of a HostReport.
type ProbeReport struct {
	Name            string            `json:"name"`
	Status          finding.Status    `json:"status"`
	Condition       string            `json:"condition"`
	Summary         string            `json:"summary"`
	DurationSeconds float64           `json:"durationSeconds"`
	Error           string            `json:"error,omitempty"`
	Findings        []finding.Finding `json:"findings,omitempty"`
}

// NewHostReport gathers the reports of one pass.
func NewHostReport(node, version string, o host.OS, at time.Time, reports []finding.Report) HostReport {
	r := HostReport{
		APIVersion: "hosthygiene.io/v1alpha1", Kind: "HostReport",
		Node: node, Time: at.UTC().Truncate(time.Second), AgentVersion: version,
		Host: HostInfo{OS: o.ID, OSVersion: o.VersionID, OSClass: string(o.Class), Kernel: o.Kernel, Init: o.Init},
	}
	for _, p := range reports {
		pr := ProbeReport{Name: p.Probe, Status: p.Status, Condition: p.Condition, Summary: p.Summary,
			DurationSeconds: p.Duration.Round(time.Microsecond).Seconds(), Findings: p.Findings}
		if p.Err != nil {
			pr.Error = p.Err.Error()
		}
		r.Probes = append(r.Probes, pr)
	}
	return r
}

// ExitCode is 0 when nothing is wrong, 1 with a warning or critical finding, 3
// when nothing was found but a probe could not run.
func (r HostReport) ExitCode() int {
	code := 0
	for _, p := range r.Probes {
		switch p.Status {
		case finding.Problem:
			return 1
		case finding.Unknown:
			code = 3
		}
	}
	return code
}

// Style says how a text is shown.
type Style struct {
	terminal.Look
	// Wide shows every finding with all its evidence, and how long each probe
	// took.
	Wide bool
}

func (s Style) status(st finding.Status) string {
	text := fmt.Sprintf("%-13s", st)
	switch st {
	case finding.OK:
		return s.Paint(terminal.Green, text)
	case finding.Problem:
		return s.Paint(terminal.Red, text)
	case finding.Unknown:
		return s.Paint(terminal.Yellow, text)
	}
	return s.Paint(terminal.Grey, text)
}

func (s Style) severity(f finding.Finding) string {
	text := string(f.Severity)
	if f.Muted != nil {
		return s.Paint(terminal.Grey, "muted "+text)
	}
	switch f.Severity {
	case finding.Critical:
		return s.Paint(terminal.Red+";"+terminal.Bold, text)
	case finding.Warning:
		return s.Paint(terminal.Yellow, text)
	}
	return s.Paint(terminal.Blue, text)
}

// WriteTable writes the report for a person: one row a probe, what was found
// under it with what was observed, what was expected and where it was read.
func (r HostReport) WriteTable(w io.Writer, s Style) error {
	var b strings.Builder
	osName := strings.TrimSpace(r.Host.OS + " " + r.Host.OSVersion)
	fmt.Fprintf(&b, "%s  %s (%s), kernel %s, init %s\n\n", s.Paint(terminal.Bold, oneLine(r.Node)),
		oneLine(osName), oneLine(r.Host.OSClass), oneLine(r.Host.Kernel), oneLine(r.Host.Init))
	header := fmt.Sprintf("%-10s %-13s", "PROBE", "STATUS")
	if s.Wide {
		header += fmt.Sprintf(" %8s", "TOOK")
	}
	fmt.Fprintf(&b, "%s SUMMARY\n", header)
	for _, p := range r.Probes {
		row := fmt.Sprintf("%-10s %s", p.Name, s.status(p.Status))
		if s.Wide {
			row += fmt.Sprintf(" %6.0fms", p.DurationSeconds*1000)
		}
		s.line(&b, row+" "+oneLine(p.Summary), len(header)+1)
		for _, f := range p.Findings {
			s.finding(&b, f)
		}
		if p.Error != "" {
			for line := range strings.Lines(p.Error) {
				s.line(&b, "  "+s.Paint(terminal.Yellow, "could not check:")+" "+oneLine(strings.TrimSuffix(line, "\n")), 6)
			}
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// line writes one line, in as many rows as it takes.
func (s Style) line(b *strings.Builder, text string, indent int) {
	b.WriteString(strings.ReplaceAll(s.Wrap(text, indent), together, " ") + "\n")
}

// together stands for a blank at which a line is not broken. What comes from the
// host has none, for oneLine escapes it.
const together = "\u00a0"

func (s Style) finding(b *strings.Builder, f finding.Finding) {
	head := "  " + s.severity(f) + " " + s.Paint(terminal.Bold, f.Reason)
	if f.Subject != "" && !strings.Contains(f.Message, f.Subject) {
		head += " " + oneLine(f.Subject)
	}
	s.line(b, head+": "+oneLine(f.Message), 6)
	if f.Muted != nil {
		text := "muted"
		if !f.Muted.Until.IsZero() {
			text += " until " + f.Muted.Until.Format(time.RFC3339)
		}
		if f.Muted.Because != "" {
			text += ", because: " + oneLine(f.Muted.Because)
		}
		s.line(b, "      "+s.Paint(terminal.Grey, text), 8)
	}
	const few = 3
	evidence := f.Evidence
	if !s.Wide && len(evidence) > few {
		evidence = evidence[:few]
	}
	for _, e := range evidence {
		text := "      observed " + oneLine(e.Observed)
		if e.Expected != "" {
			text += ", expected " + oneLine(e.Expected)
		}
		source := strings.ReplaceAll("["+oneLine(e.Source)+"]", " ", together)
		s.line(b, text+"  "+s.Paint(terminal.Grey, source), 8)
	}
	if more := len(f.Evidence) - len(evidence); more > 0 {
		s.line(b, "      "+s.Paint(terminal.Grey, fmt.Sprintf("and %d more, see -o wide", more)), 8)
	}
	if f.Remedy != nil && s.Wide {
		s.line(b, "      remedy   "+oneLine(f.Remedy.Action)+" "+oneLine(f.Remedy.Subject), 8)
	}
}

// WriteDetails writes what a probe can show besides its findings, and what of it
// could not be had.
func WriteDetails(w io.Writer, tables []probes.Table, failed string, s Style) error {
	var b strings.Builder
	for _, t := range tables {
		fmt.Fprintf(&b, "\n%s\n", s.Paint(terminal.Bold, oneLine(t.Title)))
		var rows [][]string
		for _, row := range append([][]string{t.Header}, t.Rows...) {
			cells := make([]string, len(row))
			for i, cell := range row {
				cells[i] = oneLine(cell)
			}
			rows = append(rows, cells)
		}
		b.WriteString(s.Table(rows, 2))
	}
	if failed != "" {
		b.WriteByte('\n')
		for line := range strings.Lines(failed) {
			s.line(&b, "  "+s.Paint(terminal.Yellow, "could not be shown:")+" "+oneLine(strings.TrimSuffix(line, "\n")), 6)
		}
	}
	_, err := io.WriteString(w, b.String())
	return err
}

type junitSuite struct {
	XMLName  xml.Name    `xml:"testsuite"`
	Name     string      `xml:"name,attr"`
	Tests    int         `xml:"tests,attr"`
	Failures int         `xml:"failures,attr"`
	Errors   int         `xml:"errors,attr"`
	Skipped  int         `xml:"skipped,attr"`
	Time     string      `xml:"time,attr"`
	Stamp    string      `xml:"timestamp,attr"`
	Host     string      `xml:"hostname,attr"`
	Cases    []junitCase `xml:"testcase"`
}

type junitCase struct {
	Name    string     `xml:"name,attr"`
	Class   string     `xml:"classname,attr"`
	Time    string     `xml:"time,attr"`
	Failure *junitText `xml:"failure,omitempty"`
	Error   *junitText `xml:"error,omitempty"`
	Skipped *junitText `xml:"skipped,omitempty"`
	Out     string     `xml:"system-out,omitempty"`
}

type junitText struct {
	Type    string `xml:"type,attr,omitempty"`
	Message string `xml:"message,attr"`
	Text    string `xml:",chardata"`
}

// WriteJUnit writes the report as a JUnit test suite, a test case a probe.
func (r HostReport) WriteJUnit(w io.Writer) error {
	suite := junitSuite{Name: "host-hygiene " + oneLine(r.Node), Tests: len(r.Probes), Host: oneLine(r.Node), Stamp: r.Time.Format("2006-01-02T15:04:05")}
	var total float64
	for _, p := range r.Probes {
		total += p.DurationSeconds
		c := junitCase{Name: p.Name, Class: "host-hygiene", Time: fmt.Sprintf("%.6f", p.DurationSeconds), Out: oneLine(p.Summary)}
		var text strings.Builder
		for _, f := range p.Findings {
			Style{Wide: true}.finding(&text, f)
		}
		if p.Error != "" {
			text.WriteString("could not check: " + Lines(p.Error) + "\n")
		}
		switch p.Status {
		case finding.Problem:
			suite.Failures++
			worst, _ := finding.Worst(p.Findings)
			c.Failure = &junitText{worst.Reason, oneLine(worst.String()), text.String()}
		case finding.Unknown:
			suite.Errors++
			c.Error = &junitText{ReasonCheckFailed, oneLine(p.Error), text.String()}
		case finding.NotApplicable:
			suite.Skipped++
			c.Skipped = &junitText{Message: oneLine(p.Summary)}
		default: // what is only information, or muted, is told all the same
			c.Out = strings.TrimSuffix(c.Out+"\n"+text.String(), "\n")
		}
		suite.Cases = append(suite.Cases, c)
	}
	suite.Time = fmt.Sprintf("%.6f", total)
	if _, err := io.WriteString(w, xml.Header); err != nil {
		return err
	}
	enc := xml.NewEncoder(w)
	enc.Indent("", "  ")
	if err := enc.Encode(suite); err != nil {
		return err
	}
	_, err := io.WriteString(w, "\n")
	return err
}
