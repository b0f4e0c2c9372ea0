package config

import (
	"encoding/json"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"go.yaml.in/yaml/v3"
)

const (
	// maxNodes bounds what aliases can make of a small file. The contract's
	// example has about 150 values.
	maxNodes = 20_000
	// maxDepth is far above the config's own six levels and far below what
	// recursion can bear.
	maxDepth = 50
	// maxKey is the longest key that means something: a label's, which is a
	// DNS name of 253, a slash and a name of 63.
	maxKey = 317
	// maxProblems is how many mistakes are told at once.
	maxProblems = 100
)

// node is one value of the file, with aliases resolved. It knows where it was
// written, also after it was merged into another tree.
type node struct {
	// parent and key (or, for an entry of a list, index) say where it stands.
	// Paths are made when asked for: kept in every node, those of a hostile
	// file would fill the memory.
	parent *node
	key    string
	index  int
	line   int
	kind   yaml.Kind // mapping, sequence or scalar
	// tag is what YAML took a scalar for: !!str, !!int, !!null ...; value is
	// its literal text, so that 0644 and 02:00 arrive as they were written.
	tag, value string
	fields     []field
	items      []*node
}

type field struct {
	key   string
	line  int
	value *node
}

// path is the field path in the file, such as overrides[0].probes.time.
func (n *node) path() string {
	switch {
	case n.parent == nil:
		return ""
	case n.key != "":
		return below(n.parent.path(), n.key)
	case n.index >= 0:
		return fmt.Sprintf("%s[%d]", n.parent.path(), n.index)
	}
	return n.parent.path()
}

func (n *node) null() bool { return n.kind == yaml.ScalarNode && n.tag == "!!null" }

// count is how many values there are in n.
func (n *node) count() int {
	c := 1
	for _, f := range n.fields {
		c += f.value.count()
	}
	for _, item := range n.items {
		c += item.count()
	}
	return c
}

func (n *node) get(key string) *node {
	for _, f := range n.fields {
		if f.key == key {
			return f.value
		}
	}
	return nil
}

// what names the kind of value for a message.
func (n *node) what() string {
	switch n.kind {
	case yaml.MappingNode:
		return "a mapping"
	case yaml.SequenceNode:
		return "a list"
	}
	return fmt.Sprintf("%q", n.value)
}

// json is the value as encoding/json has it, every scalar as a string, for
// types that decode themselves.
func (n *node) json() any {
	switch n.kind {
	case yaml.MappingNode:
		m := map[string]any{}
		for _, f := range n.fields {
			m[f.key] = f.value.json()
		}
		return m
	case yaml.SequenceNode:
		l := []any{}
		for _, item := range n.items {
			l = append(l, item.json())
		}
		return l
	}
	if n.null() {
		return nil
	}
	return n.value
}

// marshal can not fail: a tree is finite and holds strings only.
func (n *node) marshal() []byte {
	data, _ := json.Marshal(n.json())
	return data
}

var simpleKey = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// below is the path of a key under a path.
func below(path, key string) string {
	switch {
	case !simpleKey.MatchString(key):
		return fmt.Sprintf("%s[%q]", path, key)
	case path == "":
		return key
	}
	return path + "." + key
}

// builder turns YAML nodes into ours.
type builder struct {
	problems
	nodes   int
	open    map[*yaml.Node]bool // anchors being resolved, to find cycles
	tooMany bool                // more than maxNodes: the rest is not looked at
}

// build makes y the value of key, or the entry at index, of parent; an index of
// -1 with an empty key is the parent's own place. It returns nil for what can
// not be used; why is among the problems.
func (b *builder) build(y *yaml.Node, parent *node, key string, index, depth int) *node {
	if b.tooMany {
		return nil
	}
	n := &node{parent: parent, key: key, index: index, line: y.Line, kind: y.Kind}
	if b.nodes++; b.nodes > maxNodes {
		b.tooMany = true
		b.bad(y.Line, "", "more than %d values in one config, counting what aliases repeat", maxNodes)
		return nil
	}
	if depth > maxDepth {
		b.bad(y.Line, parent.topKey(), "nested more than %d levels deep", maxDepth)
		return nil
	}
	if y.Kind == yaml.AliasNode {
		if b.open[y.Alias] {
			b.bad(y.Line, n.path(), "*%s contains itself", y.Value)
			return nil
		}
		b.open[y.Alias] = true
		defer delete(b.open, y.Alias)
		return b.build(y.Alias, parent, key, index, depth+1)
	}
	if y.Anchor != "" && !b.open[y] {
		b.open[y] = true
		defer delete(b.open, y)
	}
	switch tag := y.ShortTag(); {
	case y.Kind == yaml.MappingNode && tag == "!!map":
		b.mapping(n, y, depth)
		return n
	case y.Kind == yaml.SequenceNode && tag == "!!seq":
		for i, item := range y.Content {
			if v := b.build(item, n, "", i, depth+1); v != nil && v.null() {
				b.bad(v.line, v.path(), "the entry is empty")
			} else if v != nil {
				n.items = append(n.items, v)
			}
		}
		return n
	case y.Kind == yaml.ScalarNode && slices.Contains(scalarTags, tag):
		n.tag, n.value = tag, y.Value
		return n
	default:
		b.bad(y.Line, n.path(), "the tag %s has no meaning here: leave it out", tag)
		return nil
	}
}

var scalarTags = []string{"!!str", "!!int", "!!float", "!!bool", "!!null", "!!timestamp", "!!merge"}

// topKey is where a value stands that is too deep to be told in full.
func (n *node) topKey() string {
	for n.parent != nil && n.parent.parent != nil {
		n = n.parent
	}
	return n.path()
}

// mapping fills n; keys given outright win over those merged in with <<.
func (b *builder) mapping(n *node, y *yaml.Node, depth int) {
	seen := map[string]int{}
	var merges []*yaml.Node
	for i := 0; i+1 < len(y.Content); i += 2 {
		k, v := y.Content[i], y.Content[i+1]
		if k.Kind == yaml.AliasNode {
			k = k.Alias
		}
		switch {
		case k.Kind == yaml.ScalarNode && k.ShortTag() == "!!merge":
			merges = append(merges, v)
			continue
		case k.Kind != yaml.ScalarNode || k.Value == "":
			b.bad(y.Content[i].Line, n.path(), "a key must be a plain word")
			continue
		case len(k.Value) > maxKey:
			b.bad(y.Content[i].Line, n.path(), "a key of %d characters: want %d at most", len(k.Value), maxKey)
			continue
		}
		line := y.Content[i].Line
		if first, dup := seen[k.Value]; dup {
			b.bad(line, below(n.path(), k.Value), "given twice, first on line %d", first)
			continue
		}
		seen[k.Value] = line
		if value := b.build(v, n, k.Value, -1, depth+1); value != nil {
			n.fields = append(n.fields, field{k.Value, line, value})
		}
	}
	for _, m := range merges {
		from := b.build(m, n, "", -1, depth+1)
		if from == nil {
			continue
		}
		sources := []*node{from}
		if from.kind == yaml.SequenceNode {
			sources = from.items
		}
		for _, src := range sources {
			if src.kind != yaml.MappingNode {
				b.bad(m.Line, n.path(), "<< wants a mapping, such as *anchor, not %s", src.what())
				continue
			}
			src.index = -1 // the keys stand in n itself
			for _, f := range src.fields {
				if _, given := seen[f.key]; !given {
					seen[f.key] = f.line
					n.fields = append(n.fields, f)
				}
			}
		}
	}
}

// merge lays over on top of base: mappings key by key, all else replaced. A
// null says nothing. Neither argument is changed.
func merge(base, over *node) *node {
	switch {
	case base == nil || base.null():
		return over
	case over == nil || over.null():
		return base
	case base.kind != yaml.MappingNode || over.kind != yaml.MappingNode:
		return over
	}
	// The result stands where the override does: what is wrong with the whole
	// came with the last change.
	n := &node{parent: over.parent, key: over.key, index: over.index, line: over.line, kind: yaml.MappingNode}
	at := make(map[string]int, len(base.fields))
	for i, f := range base.fields {
		at[f.key] = i
		n.fields = append(n.fields, f)
	}
	for _, f := range over.fields {
		i, ok := at[f.key]
		if !ok {
			n.fields = append(n.fields, f)
			continue
		}
		n.fields[i] = field{f.key, f.line, merge(base.fields[i].value, f.value)}
	}
	return n
}

// find follows a path such as devices[0].id from n to the deepest value there
// is. It returns the line of that value's key, or 0 when there is none, and the
// path with the place of that value in the file put before what could not be
// followed.
func (n *node) find(path string) (line int, full string) {
	for path != "" {
		next, rest, at := n.step(path)
		if next == nil {
			break
		}
		n, path, line = next, rest, at
	}
	full = n.path()
	if path != "" && path[0] != '[' && full != "" {
		full += "."
	}
	return line, full + path
}

// step takes the first part of a path; keys that contain dots match whole.
func (n *node) step(path string) (next *node, rest string, line int) {
	if n.kind == yaml.SequenceNode {
		var i int
		if _, err := fmt.Sscanf(path, "[%d]", &i); err != nil || i < 0 || i >= len(n.items) {
			return nil, "", 0
		}
		_, rest, _ = strings.Cut(path, "]")
		return n.items[i], strings.TrimPrefix(rest, "."), n.items[i].line
	}
	longest := -1
	for _, f := range n.fields {
		rest, ok := strings.CutPrefix(path, f.key)
		if ok && len(f.key) > longest && (rest == "" || rest[0] == '.' || rest[0] == '[') {
			longest, next, line = len(f.key), f.value, f.line
		}
	}
	if next == nil {
		return nil, "", 0
	}
	return next, strings.TrimPrefix(path[longest:], "."), line
}
