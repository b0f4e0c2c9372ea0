package remedy

import (
	"fmt"
	"strings"
)

// maxDiffLines bounds the quadratic comparison: a file longer than any drop-in
// is shown as replaced whole.
const maxDiffLines = 2000

// contextLines stand around each change, as diff -u has it.
const contextLines = 3

// unifiedDiff compares two texts line by line. An absent file is /dev/null.
func unifiedDiff(name, before, after string, existed bool) string {
	a, b := splitLines(before), splitLines(after)
	from := name
	if !existed {
		from = "/dev/null"
	}
	ops := compareLines(a, b)
	var out strings.Builder
	fmt.Fprintf(&out, "--- %s\n+++ %s\n", from, name)
	for start := 0; start < len(ops); {
		// A hunk begins before the next change and ends when none is near.
		first := start
		for first < len(ops) && ops[first].kind == ' ' {
			first++
		}
		if first == len(ops) {
			break
		}
		begin, end, last := max(start, first-contextLines), first, first
		for end < len(ops) && end-last <= 2*contextLines {
			if ops[end].kind != ' ' {
				last = end
			}
			end++
		}
		end = min(len(ops), last+1+contextLines)
		writeHunk(&out, ops, begin, end)
		start = end
	}
	return out.String()
}

func writeHunk(out *strings.Builder, ops []lineOp, begin, end int) {
	fromLine, toLine, fromN, toN := 1, 1, 0, 0
	for i, op := range ops[:end] {
		inFrom, inTo := op.kind != '+', op.kind != '-'
		switch {
		case i >= begin:
			fromN, toN = fromN+count(inFrom), toN+count(inTo)
		default:
			fromLine, toLine = fromLine+count(inFrom), toLine+count(inTo)
		}
	}
	// diff(1) numbers an empty range by the line before it.
	if fromN == 0 {
		fromLine--
	}
	if toN == 0 {
		toLine--
	}
	fmt.Fprintf(out, "@@ -%s +%s @@\n", hunkRange(fromLine, fromN), hunkRange(toLine, toN))
	for _, op := range ops[begin:end] {
		out.WriteByte(op.kind)
		out.WriteString(strings.TrimSuffix(op.text, "\n"))
		out.WriteByte('\n')
		if !strings.HasSuffix(op.text, "\n") {
			out.WriteString("\\ No newline at end of file\n")
		}
	}
}

func hunkRange(line, n int) string {
	if n == 1 {
		return fmt.Sprint(line)
	}
	return fmt.Sprintf("%d,%d", line, n)
}

func count(b bool) int {
	if b {
		return 1
	}
	return 0
}

// splitLines keeps each line's newline, so that a missing last one is a
// difference.
func splitLines(s string) []string {
	lines := strings.SplitAfter(s, "\n")
	if last := len(lines) - 1; lines[last] == "" {
		lines = lines[:last]
	}
	return lines
}

// lineOp is one line of a comparison: ' ' in both, '-' before, '+' after.
type lineOp struct {
	kind byte
	text string
}

// compareLines finds a longest common subsequence.
func compareLines(a, b []string) []lineOp {
	var ops []lineOp
	if len(a) > maxDiffLines || len(b) > maxDiffLines {
		for _, l := range a {
			ops = append(ops, lineOp{'-', l})
		}
		for _, l := range b {
			ops = append(ops, lineOp{'+', l})
		}
		return ops
	}
	// common[i][j] is the length of it for a[i:] and b[j:].
	common := make([][]int16, len(a)+1)
	for i := range common {
		common[i] = make([]int16, len(b)+1)
	}
	for i := len(a) - 1; i >= 0; i-- {
		for j := len(b) - 1; j >= 0; j-- {
			if a[i] == b[j] {
				common[i][j] = common[i+1][j+1] + 1
			} else {
				common[i][j] = max(common[i+1][j], common[i][j+1])
			}
		}
	}
	i, j := 0, 0
	for i < len(a) || j < len(b) {
		switch {
		case i < len(a) && j < len(b) && a[i] == b[j]:
			ops = append(ops, lineOp{' ', a[i]})
			i, j = i+1, j+1
		case i < len(a) && (j == len(b) || common[i+1][j] >= common[i][j+1]):
			ops = append(ops, lineOp{'-', a[i]})
			i++
		default:
			ops = append(ops, lineOp{'+', b[j]})
			j++
		}
	}
	return ops
}
