// Package terminal makes text fit to be shown: nothing that comes from a host or
// from an API may give a terminal orders, and colours are for terminals that
// want them.
package terminal

import (
	"fmt"
	"io"
	"os"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/term"
)

// The colours, as SGR parameters (ECMA-48, 8.3.117). The sixteen named ones are
// what each terminal makes of them: yellow can not be read on white in most, blue
// on black in xterm, and Solarized draws the bright black in its own background.
// These are of the fixed part of the palette of 256, and can be read on dark and
// on light.
const (
	Red    = "38;5;196"
	Green  = "38;5;28"
	Yellow = "38;5;136"
	Blue   = "38;5;32"
	Grey   = "38;5;244"
	Bold   = "1"
)

// Is says whether w is a terminal.
func Is(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Colour: a terminal that has not been told otherwise (https://no-color.org), and
// that does not take 38;5;28 for three orders, the second of which is to blink.
func Colour(w io.Writer) bool {
	kind := os.Getenv("TERM")
	return os.Getenv("NO_COLOR") == "" && kind != "dumb" && kind != "ansi" && !strings.HasPrefix(kind, "vt") && Is(w)
}

// Look is how text is laid out for where it goes. The zero value is for a pipe.
type Look struct {
	// Colour: it is a terminal that wants colours.
	Colour bool
	// Columns is how wide it is, 0 for lines of any length.
	Columns int
}

// LookOf says how text looks best on w.
func LookOf(w io.Writer) Look { return Look{Colour(w), Width(w)} }

// Paint colours text, which must be fit to be shown, with one of the colours.
func (l Look) Paint(colour, text string) string {
	if !l.Colour || text == "" || colour == "" {
		return text
	}
	return "\x1b[" + colour + "m" + text + "\x1b[0m"
}

// Width is how many columns a terminal has, 0 for what is none or does not say.
func Width(w io.Writer) int {
	width, _ := Size(w)
	return width
}

// Size is Width, and how many rows there are.
func Size(w io.Writer) (columns, rows int) {
	f, ok := w.(*os.File)
	if !ok {
		return 0, 0
	}
	columns, rows, err := term.GetSize(int(f.Fd()))
	if err != nil {
		return 0, 0
	}
	return columns, rows
}

// Line makes text fit to be shown: one line, valid UTF-8, no control characters
// (a terminal would obey them) and no invisible ones.
func Line(s string) string {
	clean := func(r rune) bool {
		return r == utf8.RuneError || !unicode.IsPrint(r)
	}
	if strings.IndexFunc(s, clean) < 0 {
		return s
	}
	var b strings.Builder
	for i, r := range s {
		switch {
		case r == '\n' || r == '\t':
			b.WriteByte(' ')
		case r == utf8.RuneError:
			fmt.Fprintf(&b, `\x%02x`, s[i])
		case !unicode.IsPrint(r):
			fmt.Fprintf(&b, `\u%04x`, r)
		default:
			b.WriteRune(r)
		}
	}
	return b.String()
}

// maxLine is the longest line, in bytes, that Lines holds back to see its end.
const maxLine = 64 << 10

// Lines passes on what is written to it line by line, each made fit by Line.
// Close passes on a last line that has no end.
type Lines struct {
	to   io.Writer
	part []byte
}

// NewLines returns one that passes on to a writer.
func NewLines(to io.Writer) *Lines { return &Lines{to: to} }

func (l *Lines) Write(p []byte) (int, error) {
	n := len(p)
	for len(p) > 0 {
		end := len(p)
		for i, c := range p {
			if c == '\n' {
				end = i + 1
				break
			}
		}
		l.part = append(l.part, p[:end]...)
		p = p[end:]
		if l.part[len(l.part)-1] != '\n' && len(l.part) < maxLine {
			return n, nil
		}
		if err := l.pass(); err != nil {
			return 0, err
		}
	}
	return n, nil
}

func (l *Lines) pass() error {
	line := strings.TrimSuffix(string(l.part), "\n")
	l.part = l.part[:0]
	_, err := io.WriteString(l.to, Line(line)+"\n")
	return err
}

// Close ends the last line.
func (l *Lines) Close() error {
	if len(l.part) == 0 {
		return nil
	}
	return l.pass()
}
