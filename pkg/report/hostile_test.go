package report

import (
	"bytes"
	"encoding/json"
	"encoding/xml"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"strings"
	"testing"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/host"
)

// hostileTexts are what a process, a file or a volume may be called: every byte,
// and a rune of every kind that does something to a terminal, to the direction of
// text, or to a parser.
func hostileTexts() []string {
	texts := []string{
		"\x1b[2J\x1b]0;owned\a", "a\u009b31mb", "\u009d0;title\u009c", // CSI and OSC, as one byte and as two
		"x\r\nhosthygiene_problem 1", "a\n\x00b", "\u2028x\u2029", "\x7f\b\b\b",
		"\u202eexe.cod\u202c", "\u2066x\u2069", "\u200b\u200d\ufeff", "\u00ad", "\U000e0041\U000e007f", // tags
		"\ufffd\xff\xc3\x28\xed\xa0\x80\xf4\x90\x80\x80", // what is no UTF-8
		"]]>&<!--\"'`${x}%s%n{{.}}", "key: [value", "- |\n  x", "%!d(MISSING)", "\"} 1\n# HELP x",
		strings.Repeat("\u20ac", 4_000), strings.Repeat("\x1b", 100_000), strings.Repeat("e\u0301", 5_000),
		"\U0010ffff\ufffe\ue000", "",
	}
	var every strings.Builder
	for b := range 256 {
		texts = append(texts, "<"+string([]byte{byte(b)})+">")
		every.WriteByte(byte(b))
	}
	var runes strings.Builder
	for r := rune(0); r < 0x2100; r++ {
		runes.WriteRune(r)
	}
	return append(texts, every.String(), runes.String())
}

// media are the forms a report takes for people and programs, by name.
func media(t *testing.T, text string) map[string][]byte {
	t.Helper()
	r := NewHostReport(text, "v0", host.OS{ID: text, VersionID: text, Kernel: text, Init: text}, time.Unix(0, 0), []finding.Report{
		{Probe: "problem", Condition: "c", Status: finding.Problem, Summary: text, Err: errors.New("no " + text), Findings: []finding.Finding{
			{Reason: "PathsDegraded", Severity: finding.Warning, Subject: text, Message: text,
				Evidence: []finding.Evidence{{Source: text, Observed: text, Expected: text}},
				Muted:    &finding.Mute{Because: text}},
			{Reason: "PathsDegraded", Severity: finding.Warning, Subject: "x", Message: "m " + text, Remedy: &finding.Remedy{Action: "start-unit", Subject: text}},
		}},
		{Probe: "unknown", Condition: "c", Status: finding.Unknown, Summary: text, Err: fmt.Errorf("%s", text)},
		{Probe: "none", Condition: "c", Status: finding.NotApplicable, Summary: text},
	})
	out := map[string][]byte{}
	for name, write := range map[string]func(io.Writer) error{
		"table": func(w io.Writer) error { return r.WriteTable(w, Style{}) },
		"wide":  func(w io.Writer) error { return r.WriteTable(w, Style{Wide: true}) },
		"json":  func(w io.Writer) error { return WriteJSON(w, r) },
		"yaml":  func(w io.Writer) error { return WriteYAML(w, r) },
		"junit": r.WriteJUnit,
		"log json": func(w io.Writer) error {
			slog.New(slog.NewJSONHandler(Escape(w), nil)).Warn(text, "error", errors.New(text), text, text)
			return nil
		},
		"log text": func(w io.Writer) error {
			slog.New(slog.NewTextHandler(Escape(w), nil)).Warn(text, "error", errors.New(text), text, text)
			return nil
		},
		"error": func(w io.Writer) error { _, err := io.WriteString(w, Lines(text)+"\n"); return err },
	} {
		var b bytes.Buffer
		if err := write(&b); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		out[name] = b.Bytes()
	}
	return out
}

// TestNothingHostileIsShown: whatever the host calls things, no medium has a byte
// in it that a terminal obeys, that hides, or that is no UTF-8; documents parse,
// and what is in them is what was found.
func TestNothingHostileIsShown(t *testing.T) {
	for _, text := range hostileTexts() {
		for name, out := range media(t, text) {
			if i := bytes.IndexFunc(out, func(r rune) bool { return r != '\n' && !unicode.IsPrint(r) }); i >= 0 || !utf8.Valid(out) {
				t.Errorf("%.40q in %s: %q", text, name, out[max(0, i-10):min(len(out), max(0, i)+10)])
			}
			checkMedium(t, name, text, out)
		}
	}
}

func checkMedium(t *testing.T, name, text string, out []byte) {
	t.Helper()
	valid := strings.ToValidUTF8(text, "\ufffd")
	var r HostReport
	switch name {
	case "json":
		if err := json.Unmarshal(out, &r); err != nil {
			t.Errorf("%.40q: %s: %v", text, name, err)
		} else if got := r.Probes[0].Findings[0].Subject; utf8.ValidString(text) && got != valid {
			t.Errorf("%.40q: %s has %.40q", text, name, got)
		}
	case "yaml":
		if err := yaml.Unmarshal(out, &r); err != nil {
			t.Errorf("%.40q: %s: %v", text, name, err)
		} else if got := r.Probes[0].Findings[0].Subject; utf8.ValidString(text) && got != valid {
			t.Errorf("%.40q: %s has %.40q", text, name, got)
		}
	case "junit":
		dec := xml.NewDecoder(bytes.NewReader(out))
		for {
			_, err := dec.Token()
			if err == io.EOF {
				break
			}
			if err != nil {
				t.Errorf("%.40q: %s: %v", text, name, err)
				break
			}
		}
	case "log json", "log text":
		if n := bytes.Count(out, []byte("\n")); n != 1 {
			t.Errorf("%.40q: %s has %d lines", text, name, n)
		}
		if name == "log json" && !json.Valid(out) {
			t.Errorf("%.40q: %s is no JSON: %.80q", text, name, out)
		}
	case "table":
		// A row a probe, and what belongs to it: no text makes rows of its own.
		if n := bytes.Count(out, []byte("\n")); n > 16+2*strings.Count(text, "\n") {
			t.Errorf("%.40q: %d lines in the table", text, n)
		}
	}
}

// TestNothingHostileIsPublished: conditions and Events are valid, bounded text.
func TestNothingHostileIsPublished(t *testing.T) {
	fit := func(what, text, message string, limit int) {
		t.Helper()
		if len(message) > limit || !utf8.ValidString(message) || strings.IndexFunc(message, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			t.Errorf("%s of %.40q: %d bytes, %.60q", what, text, len(message), message)
		}
	}
	for _, text := range hostileTexts() {
		var many []finding.Finding
		for i := range 30 {
			many = append(many, finding.Finding{Reason: "PathsDegraded", Severity: finding.Warning, Subject: fmt.Sprint(i, text), Message: text})
		}
		s := snapshot(
			finding.Report{Probe: "problem", Findings: many},
			finding.Report{Probe: "fine", Summary: text},
			finding.Report{Probe: "torn", Err: errors.New(text)})
		s.ConfigError = errors.New(text)
		for _, c := range Conditions(s) {
			fit(c.Type, text, c.Message, maxMessage)
		}
		p := NewPublisher(nil, "n1", time.Unix(0, 0), slog.New(slog.DiscardHandler), nil)
		p.Tell("Warning", "RemedyFailed", text, text)
		node := &Node{}
		events := p.noticed(node)
		for _, f := range many[:2] {
			events = append(events, p.event(node, "c", f.Reason, f.Subject, "Warning", eventMessage(f), time.Unix(0, 0)))
		}
		for _, e := range events {
			var body struct {
				Message  string
				Metadata struct{ Name string }
			}
			if err := json.Unmarshal(e.body, &body); err != nil {
				t.Fatal(err)
			}
			fit("Event", text, body.Message, 1024)
			fit("name of the Event", text, body.Metadata.Name, 253)
		}
	}
}

// TestNothingHostileIsALabel: labels are valid and bounded, no two series are the
// same, and what a pod can name makes none at all.
func TestNothingHostileIsALabel(t *testing.T) {
	var samples []finding.Sample
	for _, text := range hostileTexts() {
		samples = append(samples, finding.Sample{Metric: "hosthygiene_multipath_paths", Labels: []string{"map", text, "state", "active"}, Value: 1})
	}
	// Different names that are the same when they are escaped or cut.
	for _, name := range []string{"a\x1b", `a\u001b`, strings.Repeat("x", 1000) + "1", strings.Repeat("x", 1000) + "2"} {
		samples = append(samples, finding.Sample{Metric: "hosthygiene_multipath_paths", Labels: []string{"map", name, "state", "active"}, Value: 1})
	}
	m := NewMetrics("v1", nil)
	m.Report(snapshot(finding.Report{Probe: "multipath", Samples: samples, Findings: []finding.Finding{{Reason: "PathsDegraded", Severity: finding.Warning, Subject: "\x1b", Message: "m"}}}))
	reg := prometheus.NewPedanticRegistry()
	reg.MustRegister(m)
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	var text bytes.Buffer
	for _, f := range families {
		if _, err := expfmt.MetricFamilyToText(&text, f); err != nil {
			t.Fatal(err)
		}
		for _, metric := range f.Metric {
			for _, l := range metric.Label {
				if v := l.GetValue(); len(v) > maxLabel || !utf8.ValidString(v) || strings.IndexFunc(v, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
					t.Errorf("%s{%s=%.40q}", f.GetName(), l.GetName(), v)
				}
			}
		}
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	if _, err := parser.TextToMetricFamilies(&text); err != nil {
		t.Error(err)
	}
}

// FuzzEscape: documents mean the same with their escapes as without.
func FuzzEscape(f *testing.F) {
	for _, text := range []string{"", "a: b", "\u009b1m", "\u202e\n", "\U000e0041", "\ufeff'\"\\", "x\n", "\n x", "no", "1e3", "- \x00", "\u0085\t"} {
		f.Add(text)
	}
	f.Fuzz(func(t *testing.T, text string) {
		text = strings.ToValidUTF8(text, "")
		type doc struct {
			A string            `json:"a"`
			B []string          `json:"b"`
			C map[string]string `json:"c"`
		}
		want := doc{A: text, B: []string{"x", text}, C: map[string]string{"k": text}}
		for name, form := range map[string]struct {
			write func(io.Writer, any) error
			read  func([]byte, *doc) error
		}{
			"JSON": {WriteJSON, func(b []byte, d *doc) error { return json.Unmarshal(b, d) }},
			"YAML": {WriteYAML, func(b []byte, d *doc) error { return yaml.Unmarshal(b, d) }},
		} {
			var b bytes.Buffer
			var got doc
			if err := form.write(&b, want); err != nil {
				t.Fatal(name, err)
			}
			if err := form.read(b.Bytes(), &got); err != nil || got.A != text || got.B[1] != text || got.C["k"] != text {
				t.Fatalf("%s: %q became %+v, %v, in %q", name, text, got, err, b.Bytes())
			}
			if bytes.IndexFunc(b.Bytes(), invisible) >= 0 {
				t.Fatalf("%s shows %q", name, b.Bytes())
			}
		}
	})
}

// TestEscapedInPieces: any text of random runes, in one line.
func TestEscapedInPieces(t *testing.T) {
	rng := rand.New(rand.NewPCG(1, 2))
	for range 2000 {
		data := make([]byte, rng.IntN(64))
		for i := range data {
			data[i] = byte(rng.Uint32())
		}
		one := oneLine(string(data))
		if !utf8.ValidString(one) || strings.IndexFunc(one, func(r rune) bool { return !unicode.IsPrint(r) }) >= 0 {
			t.Fatalf("%q became %q", data, one)
		}
	}
}
