package terminal

import (
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"
)

func TestLine(t *testing.T) {
	for in, want := range map[string]string{
		"sda is offline":          "sda is offline",
		"a\nb\tc":                 "a b c",
		"\x1b[2Jgone":             `\u001b[2Jgone`,
		"\u009b31mC1":             `\u009b31mC1`,
		"\u202egnp.exe":           `\u202egnp.exe`,
		"\xff":                    `\xff`,
		"größer, 大きい":             "größer, 大きい",
		"soft\u00adhyphen\u200bx": `soft\u00adhyphen\u200bx`,
	} {
		if got := Line(in); got != want {
			t.Errorf("Line(%q) = %q, want %q", in, got, want)
		}
	}
}

func TestLines(t *testing.T) {
	const in = "time  OK\n\x1b]0;title\a rest\r\nlast"
	const want = "time  OK\n\\u001b]0;title\\u0007 rest\\u000d\nlast\n"
	for _, whole := range []bool{true, false} {
		var b strings.Builder
		l := NewLines(&b)
		if whole {
			l.Write([]byte(in))
		} else {
			for i := range len(in) {
				l.Write([]byte{in[i]})
			}
		}
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		if b.String() != want {
			t.Errorf("whole %t: got %q, want %q", whole, b.String(), want)
		}
	}
	endless := NewLines(&strings.Builder{})
	for range 3 * maxLine {
		endless.Write([]byte("x"))
	}
	if len(endless.part) > maxLine {
		t.Errorf("a line without an end holds %d bytes", len(endless.part))
	}
}

func FuzzLine(f *testing.F) {
	f.Add("a\x1b[2J\u009b\u202e\xff\n")
	f.Fuzz(func(t *testing.T, s string) {
		got := Line(s)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) && r != utf8.RuneError }) {
			t.Errorf("Line(%q) = %q", s, got)
		}
	})
}
