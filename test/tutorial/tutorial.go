// Package tutorial runs docs/tutorial.md as a reader would, on a fresh cluster,
// and makes the pictures in it of what was to be seen.
package tutorial

import (
	"bytes"
	"encoding/xml"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"
)

// Block is what a reader types at once: a fence of sh. Its picture, if it has one,
// is named in the fence: "sh picture=NAME" is docs/img/NAME.svg.
type Block struct {
	Line    int
	Text    string
	Picture string
}

// Blocks returns those of a document, in their order.
func Blocks(document string) []Block {
	var out []Block
	var now *Block
	fence := false
	for i, line := range strings.Split(document, "\n") {
		info, isFence := strings.CutPrefix(line, "```")
		switch {
		case isFence && !fence:
			fence = true
			if words := strings.Fields(info); len(words) > 0 && words[0] == "sh" {
				out = append(out, Block{Line: i + 2})
				now = &out[len(out)-1]
				for _, w := range words[1:] {
					if name, ok := strings.CutPrefix(w, "picture="); ok {
						now.Picture = name
					}
				}
			}
		case isFence:
			fence, now = false, nil
		case now != nil:
			now.Text += line + "\n"
		}
	}
	return out
}

// piece is text in one style.
type piece struct {
	text, colour string
	bold         bool
}

// screen reads what was written to a terminal of so many columns: its lines, as
// carriage returns and erasures left them. Of orders to the terminal it knows
// those that this project's programs give.
func screen(output string, columns int) [][]piece {
	type cell struct {
		r      rune
		colour string
		bold   bool
	}
	var lines [][]cell
	var line []cell
	at, colour, bold := 0, "", false
	newline := func() { lines, line, at = append(lines, line), nil, 0 }
	for i := 0; i < len(output); {
		r, n := utf8.DecodeRuneInString(output[i:])
		i += n
		switch {
		case r == '\n':
			newline()
		case r == '\r':
			at = 0
		case r == 0x1b && i < len(output) && output[i] == '[':
			end := i + 1
			for end < len(output) && (output[end] < '@' || output[end] > '~') {
				end++
			}
			if end == len(output) {
				return nil // cut off within an order
			}
			switch args := output[i+1 : end]; output[end] {
			case 'K':
				line = line[:min(at, len(line))]
			case 'm':
				switch {
				case args == "" || args == "0":
					colour, bold = "", false
				default:
					rest := args
					if before, number, ok := strings.Cut(args, "38;5;"); ok {
						number, after, _ := strings.Cut(number, ";")
						n, _ := strconv.Atoi(number)
						colour, rest = hex(n), before+after
					}
					bold = bold || strings.Trim(rest, ";") == "1"
				}
			}
			i = end + 1
		case r < ' ':
		default:
			if at == columns {
				newline()
			}
			for len(line) <= at {
				line = append(line, cell{r: ' '})
			}
			line[at] = cell{r, colour, bold}
			at++
		}
	}
	if len(line) > 0 {
		newline()
	}
	var out [][]piece
	for _, l := range lines {
		for len(l) > 0 && l[len(l)-1].r == ' ' {
			l = l[:len(l)-1]
		}
		var row []piece
		for _, c := range l {
			if last := len(row) - 1; last >= 0 && row[last].colour == c.colour && row[last].bold == c.bold {
				row[last].text += string(c.r)
				continue
			}
			row = append(row, piece{string(c.r), c.colour, c.bold})
		}
		out = append(out, row)
	}
	return out
}

// hex is a colour of xterm's palette of 256, of the part that is fixed.
func hex(n int) string {
	switch {
	case n < 16 || n > 255:
		return ""
	case n >= 232:
		grey := 8 + 10*(n-232)
		return fmt.Sprintf("#%02x%02x%02x", grey, grey, grey)
	}
	step := []int{0, 95, 135, 175, 215, 255}
	n -= 16
	return fmt.Sprintf("#%02x%02x%02x", step[n/36], step[n/6%6], step[n%6])
}

// SVG draws what was written to a terminal. It is text, which can be searched, and
// dark where the reader's browser is.
func SVG(output string, columns int) []byte {
	const fontSize, lineHeight, margin = 13, 18, 12
	rows := screen(output, columns)
	widest := 0
	for _, row := range rows {
		n := 0
		for _, p := range row {
			n += utf8.RuneCountInString(p.text)
		}
		widest = max(widest, n)
	}
	// All common fixed-width fonts are 0.6 em wide.
	width, height := 2*margin+widest*fontSize*6/10+widest/4, 2*margin+len(rows)*lineHeight
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" viewBox="0 0 %d %d">
<style>
rect { fill: #ffffff; stroke: #d0d7de; }
text { fill: #1f2328; font: %dpx ui-monospace, "DejaVu Sans Mono", Menlo, Consolas, monospace; white-space: pre; }
@media (prefers-color-scheme: dark) { rect { fill: #161b22; stroke: #30363d; } text { fill: #e6edf3; } }
</style>
<rect x="0.5" y="0.5" width="%d" height="%d" rx="6"/>
`, width, height, width, height, fontSize, width-1, height-1)
	for i, row := range rows {
		if len(row) == 0 {
			continue
		}
		fmt.Fprintf(&b, `<text xml:space="preserve" x="%d" y="%d">`, margin, margin+i*lineHeight+fontSize)
		for _, p := range row {
			b.WriteString("<tspan")
			if p.colour != "" {
				fmt.Fprintf(&b, ` fill="%s"`, p.colour)
			}
			if p.bold {
				b.WriteString(` font-weight="bold"`)
			}
			b.WriteByte('>')
			xml.EscapeText(&b, []byte(p.text)) // a bytes.Buffer takes everything
			b.WriteString("</tspan>")
		}
		b.WriteString("</text>\n")
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}
