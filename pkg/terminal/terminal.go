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

// The colours, as SGR parameters (ECMA-48, 8.3.117).
const (
	Red    = "31"
	Green  = "32"
	Yellow = "33"
	Blue   = "34"
	Grey   = "90"
	Bold   = "1"
)

// Is says whether w is a terminal.
func Is(w io.Writer) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}

// Colour: a terminal that has not been told otherwise (https://no-color.org).
func Colour(w io.Writer) bool {
	return os.Getenv("NO_COLOR") == "" && os.Getenv("TERM") != "dumb" && Is(w)
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
