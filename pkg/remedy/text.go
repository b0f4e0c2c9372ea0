package remedy

import (
	"fmt"
	"io"
	"strings"
	"unicode"
)

// WriteText writes the plan for a person: each step with why it is done and
// everything it touches.
func (p Plan) WriteText(w io.Writer, colour bool) error {
	t := text{colour: colour}
	pending := len(p.Pending())
	switch {
	case len(p.Steps) == 0:
		t.line("", "Nothing to repair.")
	default:
		t.line(bold, fmt.Sprintf("steps to take: %d, refused: %d", pending, len(p.Steps)-pending))
	}
	n := 0
	for _, s := range p.Steps {
		t.line("", "")
		if s.Refused == "" {
			n++
			t.line(bold, fmt.Sprintf("%d. %s: %s %s", n, s.ID, strings.Join(s.Actions, " and "), strings.Join(s.Subjects, " ")))
		} else {
			t.line(yellow, fmt.Sprintf("refused %s: %s %s", s.ID, strings.Join(s.Actions, " and "), strings.Join(s.Subjects, " ")))
			t.line(yellow, "   because "+s.Refused)
		}
		t.step(s)
	}
	if len(p.Without) > 0 {
		t.line("", "")
		t.line(bold, "Found, and nothing the agent could do about it")
		for _, w := range p.Without {
			t.line("", fmt.Sprintf("   %s: %s", w.Reason, w.Message))
		}
	}
	if len(p.Left) > 0 {
		t.line("", "")
		t.line(bold, "Left on this host by earlier repairs (agent rollback takes it back)")
		for _, l := range p.Left {
			t.line("", fmt.Sprintf("   %s %s: %s, since %s", l.What, l.Name, l.Text, l.At.Format("2006-01-02 15:04:05Z")))
		}
	}
	for _, u := range p.Unseen {
		t.line(yellow, "could not see "+u)
	}
	_, err := io.WriteString(w, t.b.String())
	return err
}

const (
	red, green, yellow, grey, bold = "31", "32", "33", "90", "1"
)

// text collects lines; nothing in them reaches a terminal unescaped.
type text struct {
	b      strings.Builder
	colour bool
}

func (t *text) line(code, s string) {
	s = printable(s)
	if t.colour && code != "" && s != "" {
		s = "\x1b[" + code + "m" + s + "\x1b[0m"
	}
	t.b.WriteString(s + "\n")
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
		t.line(grey, fmt.Sprintf("   why   %s: %s", w.Reason, w.Message))
	}
	if len(s.DependsOn) > 0 {
		t.line("", "   after "+strings.Join(s.DependsOn, ", "))
	}
	for _, f := range s.Files {
		t.line("", fmt.Sprintf("   file  %s mode %s owner %s", f.Path, f.Mode, f.Owner))
		for line := range strings.Lines(f.Diff) {
			code := map[byte]string{'+': green, '-': red, '@': grey}[line[0]]
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
		t.line(yellow, note)
	}
	if s.AfterReboot {
		t.line(yellow, "   takes effect with the next reboot, which the agent leaves to others")
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
func (r Record) WriteText(w io.Writer, colour bool) error {
	t := text{colour: colour}
	for _, res := range r.Results {
		code := map[Outcome]string{Applied: green, Confirmed: green, Staged: green, Failed: red, RolledBack: red}[res.Outcome]
		s := fmt.Sprintf("%-11s %s: %s", res.Outcome, res.Step, strings.Join(res.Subjects, " "))
		if res.Message != "" {
			s += ": " + strings.ReplaceAll(res.Message, "\n", "; ")
		}
		t.line(code, s)
		if res.Outcome == Failed || res.Outcome == RolledBack {
			for _, l := range res.Output {
				t.line(grey, "            | "+l)
			}
		}
	}
	_, err := io.WriteString(w, t.b.String())
	return err
}
