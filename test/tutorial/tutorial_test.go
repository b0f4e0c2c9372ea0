package tutorial

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

const document = "../../docs/tutorial.md"

func read(t *testing.T) []Block {
	t.Helper()
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	blocks := Blocks(string(text))
	if len(blocks) < 10 {
		t.Fatalf("%d blocks: the document is read wrongly", len(blocks))
	}
	return blocks
}

// TestBlocks: what the tutorial has a reader type is shell, and its pictures are
// those that a run makes.
func TestBlocks(t *testing.T) {
	text, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	var made []string
	for _, b := range read(t) {
		cmd := exec.Command("bash", "-n")
		cmd.Stdin = strings.NewReader(b.Text)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Errorf("line %d: %v: %s", b.Line, err, out)
		}
		if b.Picture != "" {
			made = append(made, "img/"+b.Picture+".svg")
		}
	}
	// One that has not been made yet stands in a comment.
	var shown []string
	for _, m := range regexp.MustCompile(`(?m)^(<!-- )?!\[.*\]\((img/.*)\)`).FindAllStringSubmatch(string(text), -1) {
		shown = append(shown, m[2])
		if _, err := os.Stat(filepath.Join(filepath.Dir(document), m[2])); (err == nil) != (m[1] == "") {
			t.Errorf("%s: in a comment: %t; %v", m[2], m[1] != "", err)
		}
	}
	if d := cmp.Diff(made, shown); d != "" {
		t.Errorf("the pictures that are made, and those that are shown (-made +shown)\n%s", d)
	}
}

func TestSVG(t *testing.T) {
	const output = "working (2s)\r            \r\x1b[1mnode-1\x1b[0m is <ill>\r\n\x1b[38;5;196;1mcritical\x1b[0m old\x1b[K\r\nabcdefghijklmnopqrstuvwxyz"
	svg := string(SVG(output, 20))
	var got []string
	for _, m := range regexp.MustCompile(`(?m)^<text.*?>(.*)</text>$`).FindAllStringSubmatch(svg, -1) {
		got = append(got, m[1])
	}
	want := []string{
		`<tspan font-weight="bold">node-1</tspan><tspan> is &lt;ill&gt;</tspan>`,
		`<tspan fill="#ff0000" font-weight="bold">critical</tspan><tspan> old</tspan>`,
		`<tspan>abcdefghijklmnopqrst</tspan>`,
		`<tspan>uvwxyz</tspan>`,
	}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
}
