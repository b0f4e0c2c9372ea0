package config

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Problem is one mistake in a config.
type Problem struct {
	// File as it was named by whoever had it read.
	File string `json:"file"`
	// Line it stands on, from 1; 0 where none can be named.
	Line int `json:"line,omitempty"`
	// Field is the path of the value, such as probes.time.maxOffset.
	Field string `json:"field,omitempty"`
	// Text says what is wrong and what would be right.
	Text string `json:"text"`
}

// Error is the one line a user sees: config.yaml:12: probes.time.maxOffset: ...
func (p Problem) Error() string {
	var b strings.Builder
	b.WriteString(p.File)
	if p.Line > 0 {
		fmt.Fprintf(&b, ":%d", p.Line)
	}
	if p.Field != "" {
		b.WriteString(": " + p.Field)
	}
	b.WriteString(": " + p.Text)
	return b.String()
}

// Problems is everything that is wrong with a config, in the order of its
// lines. It is the error of [Parse], [Load] and [Config.ForNode].
type Problems []Problem

// Error has one line for each problem.
func (ps Problems) Error() string {
	lines := make([]string, len(ps))
	for i, p := range ps {
		lines[i] = p.Error()
	}
	return strings.Join(lines, "\n")
}

// problems collects; the zero value is ready to use.
type problems struct {
	list []Problem
	// hidden is how many came after the first maxProblems.
	hidden int
}

// maxText keeps a value that a message quotes from flooding a terminal.
const maxText = 400

func (ps *problems) bad(line int, path, format string, args ...any) {
	p := Problem{Line: line, Field: shorten(path), Text: shorten(oneLine(fmt.Sprintf(format, args...)))}
	switch {
	case slices.Contains(ps.list, p): // one anchor used twice is one mistake
	case ps.full():
		ps.hidden++
	default:
		ps.list = append(ps.list, p)
	}
}

// full reports that what comes now is counted and not shown: not worth a hint.
func (ps *problems) full() bool { return len(ps.list) >= maxProblems }

// told reports whether something was said already about the value at path, or
// about one above or below it: what follows from that is not worth a line.
func (ps *problems) told(path string) bool {
	return slices.ContainsFunc(ps.list, func(p Problem) bool {
		return p.Field != "" && (within(p.Field, path) || within(path, p.Field))
	})
}

// within reports whether a path is prefix or stands below it.
func within(path, prefix string) bool {
	rest, ok := strings.CutPrefix(path, prefix)
	return ok && (rest == "" || rest[0] == '.' || rest[0] == '[')
}

// err is nil, or the Problems sorted and named for the file.
func (ps *problems) err(file string) error {
	if len(ps.list) == 0 {
		return nil
	}
	slices.SortStableFunc(ps.list, func(a, b Problem) int {
		return cmp.Or(cmp.Compare(a.Line, b.Line), cmp.Compare(a.Field, b.Field))
	})
	for i := range ps.list {
		ps.list[i].File = file
	}
	if ps.hidden > 0 {
		ps.list = append(ps.list, Problem{File: file, Text: fmt.Sprintf("and %d more", ps.hidden)})
	}
	return Problems(ps.list)
}

func shorten(s string) string {
	if len(s) <= maxText {
		return s
	}
	cut := maxText
	for !utf8.RuneStart(s[cut]) {
		cut--
	}
	return s[:cut] + "…"
}

// oneLine keeps what a value held from breaking the line or the terminal.
func oneLine(s string) string {
	if !strings.ContainsFunc(s, func(r rune) bool { return r == utf8.RuneError || !unicode.IsPrint(r) }) {
		return s
	}
	return strings.Trim(fmt.Sprintf("%q", s), `"`)
}

// nearest returns the candidate a word was probably meant to be, or "".
func nearest(word string, candidates []string) string {
	best, dist := "", 1+max(1, min(len(word), 64)/3)
	for _, c := range candidates {
		if d := distance(strings.ToLower(word), strings.ToLower(c)); d < dist {
			best, dist = c, d
		}
	}
	return best
}

// distance counts the letters to insert, drop, replace or swap with their
// neighbour (optimal string alignment), with words cut at 64 bytes.
func distance(a, b string) int {
	a, b = a[:min(len(a), 64)], b[:min(len(b), 64)]
	before, last, row := make([]int, len(b)+1), make([]int, len(b)+1), make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		before, last, row = last, row, before
		row[0] = i + 1
		for j := range len(b) {
			replace := last[j]
			if a[i] != b[j] {
				replace++
			}
			row[j+1] = min(replace, row[j]+1, last[j+1]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
	}
	return row[len(b)]
}

// wantOneOf says what a word should have been: the likely one first, else all.
func wantOneOf(word string, candidates []string) string {
	if c := nearest(word, candidates); c != "" {
		return "did you mean " + c + "?"
	}
	if len(candidates) > 16 {
		return ""
	}
	return "want one of " + strings.Join(candidates, ", ")
}
