package terminal

import (
	"strings"
	"testing"
)

func TestWrap(t *testing.T) {
	bold := Look{Colour: true}.Paint(Bold, "Reason")
	for _, tt := range []struct {
		in              string
		columns, indent int
		want            string
	}{
		{"short", 40, 4, "short"},
		{strings.Repeat("word ", 20), 0, 4, strings.Repeat("word ", 20)},
		{"  " + bold + ": a message of several words that has no room", 32, 4, "  " + bold + ": a message of several\n    words that has no room"},
		{"observed a, expected b  [/a/path/that/is/too/long/for/every/one/of/the/lines] c", 30, 2,
			"observed a, expected b\n  [/a/path/that/is/too/long/for/every/one/of/the/lines]\n  c"},
		{strings.Repeat("narrow ", 9), 30, 20, strings.Repeat("narrow ", 9)},
		{"größer größer größer größer", 24, 0, "größer größer größer\ngrößer"},
	} {
		if got := (Look{Columns: tt.columns}).Wrap(tt.in, tt.indent); got != tt.want {
			t.Errorf("Wrap(%q, %d, %d) =\n%q, want\n%q", tt.in, tt.columns, tt.indent, got, tt.want)
		}
	}
}

func TestTable(t *testing.T) {
	rows := [][]string{
		{"", "ADJ", "INTENDED", "OF"},
		{"1", "1000", "1000, a BestEffort pod's", "/kubepods.slice/kubepods-besteffort.slice"},
		{"2", "-5", "-", "größe"},
	}
	for columns, want := range map[int]string{
		0: `
     ADJ   INTENDED                  OF
  1  1000  1000, a BestEffort pod's  /kubepods.slice/kubepods-besteffort.slice
  2  -5    -                         größe
`,
		50: `
     ADJ   INTENDED            OF
  1  1000  1000, a BestEffort  /kubepods.slice/kub
           pod's               epods-besteffort.sl
                               ice
  2  -5    -                   größe
`,
		30: `
     ADJ   INTENDED      OF
  1  1000  1000, a       /kubepods.sl
           BestEffort    ice/kubepods
           pod's         -besteffort.
                         slice
  2  -5    -             größe
`,
	} {
		if got := "\n" + (Look{Columns: columns}).Table(rows, 2); got != want {
			t.Errorf("%d columns: got %s\nwant %s", columns, got, want)
		}
	}
}

func TestFrame(t *testing.T) {
	const five = "1\n2\n3\n" + "\x1b[1m4\x1b[0m" + "\n5\n"
	for _, tt := range []struct {
		name, text    string
		columns, rows int
		want          []string
	}{
		{"no size", five, 0, 0, []string{"1", "2", "3", "\x1b[1m4\x1b[0m", "5"}},
		{"it fits", five, 20, 6, []string{"1", "2", "3", "\x1b[1m4\x1b[0m", "5"}},
		{"one too many", five, 20, 5, []string{"1", "2", "3", "… and 2 more lines: this terminal has 5"}},
		{"long lines", strings.Repeat("x", 21) + "\n2\n3\n", 20, 4, []string{strings.Repeat("x", 21), "… and 2 more lines: this terminal has 4"}},
	} {
		want := "\x1b[H" + strings.Join(tt.want, "\x1b[K\n") + "\x1b[K\n\x1b[J"
		if got := frame(tt.text, tt.columns, tt.rows); got != want {
			t.Errorf("%s: got %q\nwant %q", tt.name, got, want)
		}
	}
}
