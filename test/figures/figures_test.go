package figures

import (
	"strings"
	"testing"
	"time"
)

func TestQuantile(t *testing.T) {
	var twenty Times
	for i := 20; i > 0; i-- {
		twenty = append(twenty, time.Duration(i)*time.Second)
	}
	for _, c := range []struct {
		name string
		of   Times
		want [3]time.Duration // median, 95 %, longest
	}{
		{"none", nil, [3]time.Duration{}},
		{"one", Times{3}, [3]time.Duration{3, 3, 3}},
		{"two", Times{5, 3}, [3]time.Duration{3, 5, 5}},
		{"twenty", twenty, [3]time.Duration{10 * time.Second, 19 * time.Second, 20 * time.Second}},
	} {
		if got := [3]time.Duration{c.of.Median(), c.of.P95(), c.of.Max()}; got != c.want {
			t.Errorf("%s: %v, want %v", c.name, got, c.want)
		}
	}
	if twenty[0] != 20*time.Second {
		t.Error("the times were put into another order")
	}
}

const document = `# Title
<!-- measured: costs -->
<!-- /measured: costs -->
between
<!-- measured: other -->
| what | a |
|---|---|
| x | 1 |
<!-- /measured: other -->
end
`

func TestMerge(t *testing.T) {
	doc := []byte(document)
	for _, table := range []Table{
		{Name: "costs", Header: []string{"what", "value"}, Rows: [][]string{{"CPU", "2 ms"}, {"memory", "a|b\nc"}}},
		{Name: "costs", Header: []string{"what", "value"}, Rows: [][]string{{"memory", "3 MB"}, {"requests", "1"}}},
		{Name: "other", Header: []string{"what", "b"}, Rows: [][]string{{"y", "2"}}},
	} {
		var err error
		if doc, err = table.Merge(doc); err != nil {
			t.Fatal(err)
		}
	}
	want := `# Title
<!-- measured: costs -->
| what | value |
|---|---|
| CPU | 2 ms |
| memory | 3 MB |
| requests | 1 |
<!-- /measured: costs -->
between
<!-- measured: other -->
| what | b |
|---|---|
| y | 2 |
<!-- /measured: other -->
end
`
	if string(doc) != want {
		t.Errorf("got\n%s\nwant\n%s", doc, want)
	}
}

// What was written is read back as it was, a bar in a cell too.
func TestMergeKeepsCells(t *testing.T) {
	table := Table{Name: "costs", Header: []string{"what", "value"}, Rows: [][]string{{"a|b", "1|2"}}}
	doc, err := table.Merge([]byte(document))
	if err != nil {
		t.Fatal(err)
	}
	again, err := Table{Name: "costs", Header: table.Header}.Merge(doc)
	if err != nil {
		t.Fatal(err)
	}
	if string(again) != string(doc) || !strings.Contains(string(doc), "| a&#124;b | 1&#124;2 |\n") {
		t.Errorf("%s\n%s", doc, again)
	}
}

func TestMergeRefuses(t *testing.T) {
	for _, c := range []struct {
		name  string
		table Table
		want  string
	}{
		{"no markers", Table{Name: "none", Header: []string{"what"}}, "no lines"},
		{"short row", Table{Name: "costs", Header: []string{"what", "value"}, Rows: [][]string{{"x"}}}, "1 cells, want 2"},
	} {
		if _, err := c.table.Merge([]byte(document)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}
