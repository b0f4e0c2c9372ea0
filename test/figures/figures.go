// Package figures keeps what was measured in a document: tables between
// markers, in which a run replaces the rows it has measured again and leaves
// the others, and the description of the machine they come from.
package figures

import (
	"bytes"
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
)

// Times are the durations of repetitions of one thing.
type Times []time.Duration

// Quantile is the smallest time that a share q of all do not exceed (nearest
// rank, so that it is one that was measured); 0 without any.
func (t Times) Quantile(q float64) time.Duration {
	if len(t) == 0 {
		return 0
	}
	sorted := slices.Sorted(slices.Values(t))
	rank := int(math.Ceil(q * float64(len(sorted))))
	return sorted[min(max(rank, 1), len(sorted))-1]
}

// Median, P95 and Max are what tables show.
func (t Times) Median() time.Duration { return t.Quantile(0.5) }

// P95 is the 95th percentile.
func (t Times) P95() time.Duration { return t.Quantile(0.95) }

// Max is the longest.
func (t Times) Max() time.Duration { return t.Quantile(1) }

// Seconds is a duration as tables have it.
func Seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

// Table is a table of a document. Rows are known by their first cell.
type Table struct {
	// Name is in the markers.
	Name   string
	Header []string
	Rows   [][]string
}

func markers(name string) (begin, end string) {
	return "<!-- measured: " + name + " -->\n", "<!-- /measured: " + name + " -->\n"
}

// Merge writes the table's rows between its markers in a Markdown document:
// over the row with the same first cell, or after the last. Rows of a table
// with another header are of no use any more and go.
func (t Table) Merge(doc []byte) ([]byte, error) {
	old, err := between(doc, t.Name)
	if err != nil {
		return nil, err
	}
	header := line(t.Header)
	rows := map[string][]string{}
	var order []string
	put := func(row []string) {
		if _, known := rows[row[0]]; !known {
			order = append(order, row[0])
		}
		rows[row[0]] = row
	}
	lines := strings.Split(strings.TrimSpace(old), "\n")
	if len(lines) > 2 && lines[0]+"\n" == header {
		for _, l := range lines[2:] {
			put(cells(l))
		}
	}
	for _, row := range t.Rows {
		if len(row) != len(t.Header) {
			return nil, fmt.Errorf("table %s: row %q has %d cells, want %d", t.Name, row[0], len(row), len(t.Header))
		}
		put(row)
	}
	var b strings.Builder
	b.WriteString(header)
	b.WriteString("|" + strings.Repeat("---|", len(t.Header)) + "\n")
	for _, key := range order {
		b.WriteString(line(rows[key]))
	}
	return Replace(doc, t.Name, b.String())
}

// bar is what a cell has in place of the bar that would end it.
const bar = "&#124;"

func line(row []string) string {
	var b strings.Builder
	for _, c := range row {
		b.WriteString("| " + strings.ReplaceAll(strings.Join(strings.Fields(c), " "), "|", bar) + " ")
	}
	return b.String() + "|\n"
}

func cells(line string) []string {
	list := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
	for i, c := range list {
		list[i] = strings.ReplaceAll(strings.TrimSpace(c), bar, "|")
	}
	return list
}

// Replace puts a text between the markers of a name in a document.
func Replace(doc []byte, name, text string) ([]byte, error) {
	old, err := between(doc, name)
	if err != nil {
		return nil, err
	}
	begin, end := markers(name)
	return bytes.Replace(doc, []byte(begin+old+end), []byte(begin+strings.TrimRight(text, "\n")+"\n"+end), 1), nil
}

func between(doc []byte, name string) (string, error) {
	begin, end := markers(name)
	_, rest, ok := strings.Cut(string(doc), begin)
	text, _, closed := strings.Cut(rest, end)
	if !ok || !closed {
		return "", fmt.Errorf("the document has no lines %q and %q", strings.TrimSpace(begin), strings.TrimSpace(end))
	}
	return text, nil
}
