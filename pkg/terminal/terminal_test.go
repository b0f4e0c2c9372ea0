package terminal

import (
	"fmt"
	"math"
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

// TestColours: each can be read on the backgrounds that terminals have, with the
// contrast that WCAG 2.2 asks of what is large or not only told by colour, 3 to 1.
func TestColours(t *testing.T) {
	backgrounds := map[string][3]int{
		"black": {0, 0, 0}, "white": {255, 255, 255}, "dark grey": {0x1e, 0x1e, 0x1e}, "Ubuntu's": {0x30, 0x0a, 0x24},
		"Solarized dark": {0x00, 0x2b, 0x36}, "Solarized light": {0xfd, 0xf6, 0xe3},
	}
	for name, colour := range map[string]string{"red": Red, "green": Green, "yellow": Yellow, "blue": Blue, "grey": Grey} {
		var n int
		if _, err := fmt.Sscanf(colour, "38;5;%d", &n); err != nil || n < 16 || n > 255 {
			t.Errorf("%s: %q is not of the part of the palette that is the same everywhere", name, colour)
			continue
		}
		for on, background := range backgrounds {
			a, b := luminance(palette(n)), luminance(background)
			if ratio := (max(a, b) + 0.05) / (min(a, b) + 0.05); ratio < 3 {
				t.Errorf("%s on %s: contrast %.2f", name, on, ratio)
			}
		}
	}
}

// palette is xterm's: a cube of 6 by 6 by 6, and 24 greys.
func palette(n int) [3]int {
	if n >= 232 {
		grey := 8 + 10*(n-232)
		return [3]int{grey, grey, grey}
	}
	step := []int{0, 95, 135, 175, 215, 255}
	n -= 16
	return [3]int{step[n/36], step[n/6%6], step[n%6]}
}

// luminance is the relative luminance of WCAG 2.2.
func luminance(rgb [3]int) float64 {
	var sum float64
	for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
		c := float64(rgb[i]) / 255
		if c <= 0.04045 {
			c /= 12.92
		} else {
			c = math.Pow((c+0.055)/1.055, 2.4)
		}
		sum += weight * c
	}
	return sum
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
