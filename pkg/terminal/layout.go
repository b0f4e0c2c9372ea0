package terminal

import (
	"fmt"
	"io"
	"strings"
	"unicode/utf8"
)

// visible counts the columns of text: runes, which is what columns are for most
// scripts, without the orders of Paint.
func visible(text string) int {
	n := utf8.RuneCountInString(text)
	for {
		_, order, found := strings.Cut(text, "\x1b[")
		if !found {
			return n
		}
		end := strings.IndexByte(order, 'm')
		n -= len("\x1b[") + end + 1
		text = order[end+1:]
	}
}

// leastRoom is how many columns a text needs beside its indent to be broken into
// lines at all.
const leastRoom = 24

// Wrap breaks a line at blanks so that it fits; all but the first begin with an
// indent. A word that is too long, such as a path, is left whole, for it may be
// meant to be copied.
func (l Look) Wrap(line string, indent int) string {
	if l.Columns == 0 || l.Columns-indent < leastRoom {
		return line
	}
	return wrap(line, l.Columns, indent)
}

func wrap(line string, columns, indent int) string {
	if visible(line) <= columns {
		return line
	}
	var b strings.Builder
	at, blanks := 0, 0
	begun := false // the row holds a word
	for _, word := range strings.Split(line, " ") {
		if word == "" {
			blanks++
			continue
		}
		n := visible(word)
		if begun && at+blanks+n > columns {
			b.WriteString("\n" + strings.Repeat(" ", indent))
			at, blanks = indent, 0
		}
		b.WriteString(strings.Repeat(" ", blanks) + word)
		at += blanks + n
		blanks, begun = 1, true
	}
	return b.String()
}

// UsageTemplate changes a template of cobra's so that flags are explained in so
// many columns, 0 for any.
func UsageTemplate(template string, columns int) string {
	return strings.ReplaceAll(template, ".FlagUsages", fmt.Sprintf(".FlagUsagesWrapped %d", columns))
}

// leastCell is how narrow a column of a table is made to find room.
const leastCell = 12

// Table lays out rows of the same number of cells, which must be fit to be shown,
// in columns. Where they have no room side by side, the widest columns are made
// narrower and their cells broken, long words too.
func (l Look) Table(rows [][]string, indent int) string {
	if len(rows) == 0 {
		return ""
	}
	const gap = 2
	widths := make([]int, len(rows[0]))
	for _, row := range rows {
		for i, c := range row {
			widths[i] = max(widths[i], visible(c))
		}
	}
	for l.Columns > 0 {
		all := indent - gap
		widest := 0
		for i, w := range widths {
			all += w + gap
			if w > widths[widest] {
				widest = i
			}
		}
		if all <= l.Columns || widths[widest] <= leastCell {
			break
		}
		widths[widest]--
	}
	var b strings.Builder
	for _, row := range rows {
		cells := make([][]string, len(row))
		height := 0
		for i, c := range row {
			cells[i] = breakCell(c, widths[i])
			height = max(height, len(cells[i]))
		}
		for y := range height {
			line := strings.Repeat(" ", indent)
			for i := range row {
				text := ""
				if y < len(cells[i]) {
					text = cells[i][y]
				}
				line += text + strings.Repeat(" ", widths[i]-visible(text)+gap)
			}
			b.WriteString(strings.TrimRight(line, " ") + "\n")
		}
	}
	return b.String()
}

func breakCell(text string, columns int) []string {
	var lines []string
	for line := range strings.SplitSeq(wrap(text, columns, 0), "\n") {
		runes := []rune(line)
		for len(runes) > columns {
			lines = append(lines, string(runes[:columns]))
			runes = runes[columns:]
		}
		lines = append(lines, string(runes))
	}
	return lines
}

// Redraw shows text, lines with an end each, in place of all that is on a
// terminal. What has no room is left out, and said to be.
func Redraw(w io.Writer, text string) error {
	columns, rows := Size(w)
	_, err := io.WriteString(w, frame(text, columns, rows))
	return err
}

// frame goes over the lines that are there instead of clearing them first, which
// flickers.
func frame(text string, columns, rows int) string {
	lines := strings.Split(strings.TrimSuffix(text, "\n"), "\n")
	var b strings.Builder
	b.WriteString("\x1b[H")
	room := rows - 1 // the cursor stands in the last one
	for i, line := range lines {
		if columns > 0 && rows > 0 {
			takes := max(1, (visible(line)+columns-1)/columns)
			if last := i == len(lines)-1; takes > room || takes == room && !last {
				fmt.Fprintf(&b, "… and %d more lines: this terminal has %d\x1b[K\n", len(lines)-i, rows)
				break
			}
			room -= takes
		}
		b.WriteString(line + "\x1b[K\n")
	}
	b.WriteString("\x1b[J")
	return b.String()
}
