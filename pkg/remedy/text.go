package remedy

import (
	"fmt"
	"io"
	"strings"
	"unicode"

	"github.com/hosthygiene/agent/pkg/terminal"
)

// WriteText writes the plan for a person: each step with why it is done and
// everything it touches.
func (p Plan) WriteText(w io.Writer, look terminal.Look) error {
	t := text{look: look}
	pending := len(p.Pending())
	switch {
	case len(p.Steps) == 0:
		t.line("", "Nothing to repair.")
	default:
		t.line(terminal.Bold, fmt.Sprintf("steps to take: %d, refused: %d", pending, len(p.Steps)-pending))
	}
	n := 0
	for _, s := range p.Steps {
		t.line("", "")
		if s.Refused == "" {
			n++
			t.prose(terminal.Bold, fmt.Sprintf("%d. %s: %s %s", n, s.ID, strings.Join(s.Actions, " and "), strings.Join(s.Subjects, " ")), 3)
		} else {
			t.prose(terminal.Yellow, fmt.Sprintf("refused %s: %s %s", s.ID, strings.Join(s.Actions, " and "), strings.Join(s.Subjects, " ")), 3)
			t.prose(terminal.Yellow, "   because "+s.Refused, 11)
		}
		t.step(s)
	}
	if len(p.Without) > 0 {
		t.line("", "")
		t.line(terminal.Bold, "Found, and nothing the agent could do about it")
		for _, w := range p.Without {
			t.prose("", fmt.Sprintf("   %s: %s", w.Reason, w.Message), 6)
		}
	}
	if len(p.Left) > 0 {
		t.line("", "")
		t.line(terminal.Bold, "Left on this host by earlier repairs (agent rollback takes it back)")
		for _, l := range p.Left {
			t.prose("", fmt.Sprintf("   %s %s: %s, since %s", l.What, l.Name, l.Text, l.At.Format("2006-01-02 15:04:05Z")), 6)
		}
	}
	for _, u := range p.Unseen {
		t.prose(terminal.Yellow, "could not see "+u, 4)
	}
	_, err := io.WriteString(w, t.b.String())
	return err
}

// text collects lines; nothing in them reaches a terminal unescaped.
type text struct {
	b    strings.Builder
	look terminal.Look
}

// line writes what may be meant to be copied: it is not broken.
func (t *text) line(colour, s string) {
	t.b.WriteString(t.look.Paint(colour, printable(s)) + "\n")
}

// prose writes a sentence, in as many rows as it takes.
func (t *text) prose(colour, s string, indent int) {
	t.b.WriteString(t.look.Wrap(t.look.Paint(colour, printable(s)), indent) + "\n")
}

// printable escapes what could play tricks on a terminal; tabs stay.
func printable(s string) string {
	var b strings.Builder
	for _, r := range s {
		switch {
		case r == '\t' || unicode.IsPrint(r):
			b.WriteRune(r)
		default:
			fmt.Fprintf(&b, `\u%04x`, r)
		}
	}
	return b.String()
}

func (t *text) step(s Step) {
	for _, w := range s.Why {
		t.prose(terminal.Grey, fmt.Sprintf("   why   %s: %s", w.Reason, w.Message), 9)
	}
	if len(s.DependsOn) > 0 {
		t.prose("", "   after "+strings.Join(s.DependsOn, ", "), 9)
	}
	for _, f := range s.Files {
		t.prose("", fmt.Sprintf("   file  %s mode %s owner %s", f.Path, f.Mode, f.Owner), 9)
		for line := range strings.Lines(f.Diff) {
			code := map[byte]string{'+': terminal.Green, '-': terminal.Red, '@': terminal.Grey}[line[0]]
			t.line(code, "     "+strings.TrimSuffix(line, "\n"))
		}
	}
	for _, c := range s.Commands {
		t.line("", "   run   "+shellForm(c))
	}
	if s.Sysctl != nil {
		t.line("", fmt.Sprintf("   set   %s = %s", s.Sysctl.Name, s.Sysctl.Value))
	}
	for _, u := range s.Units {
		t.line("", strings.TrimRight(fmt.Sprintf("   unit  %s %s", u.Do, u.Unit), " "))
	}
	if s.OOMScore != nil {
		t.line("", fmt.Sprintf("   set   oom_score_adj of %s's main process to %d", s.OOMScore.Unit, s.OOMScore.Score))
	}
	if s.Simulation != "" {
		note := "   dry run: " + s.Simulation
		if s.Simulation == NotSimulated {
			note += ": what else the package manager would do, plan --simulate asks it"
		}
		t.prose(terminal.Yellow, note, 9)
	}
	if s.AfterReboot {
		t.prose(terminal.Yellow, "   takes effect with the next reboot, which the agent leaves to others", 3)
	}
}

// shellForm is a command as a person would type it; what every command gets is
// left out.
func shellForm(c Command) string {
	var words []string
	for _, e := range c.Env {
		if !strings.HasPrefix(e, "PATH=") && !strings.HasPrefix(e, "HOME=") && !strings.HasPrefix(e, "LC_ALL=") {
			words = append(words, e)
		}
	}
	for _, a := range c.Argv {
		if a == "" || strings.ContainsAny(a, " \t\"'\\$`*?;&|<>()") {
			a = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
		}
		words = append(words, a)
	}
	return strings.Join(words, " ")
}

// WriteText writes for a person what became of the steps.
func (r Record) WriteText(w io.Writer, look terminal.Look) error {
	t := text{look: look}
	for _, res := range r.Results {
		code := map[Outcome]string{Applied: terminal.Green, Confirmed: terminal.Green, Staged: terminal.Green, Failed: terminal.Red, RolledBack: terminal.Red}[res.Outcome]
		s := fmt.Sprintf("%-11s %s: %s", res.Outcome, res.Step, strings.Join(res.Subjects, " "))
		if res.Message != "" {
			s += ": " + strings.ReplaceAll(res.Message, "\n", "; ")
		}
		t.prose(code, s, 12)
		if res.Outcome == Failed || res.Outcome == RolledBack {
			for _, l := range res.Output {
				t.line(terminal.Grey, "            | "+l)
			}
		}
	}
	_, err := io.WriteString(w, t.b.String())
	return err
}
