package config

import (
	"encoding/json"
	"math"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
	"k8s.io/apimachinery/pkg/api/resource"

	"github.com/hosthygiene/agent/pkg/probes"
)

// decoder sets Go values from a tree and collects all that does not fit.
type decoder struct{ problems }

// decode sets v from n and leaves alone what n does not mention. What does not
// fit is told and left as it was, and the rest still decoded, so that one run
// tells every mistake. A null is the same as a missing key.
func (d *decoder) decode(n *node, v reflect.Value) {
	if n.null() {
		return
	}
	if v.Kind() == reflect.Pointer {
		fresh := reflect.New(v.Type().Elem())
		d.decode(n, fresh.Elem())
		v.Set(fresh)
		return
	}
	hasFields := len(structFields(v.Type())) > 0
	if u, ok := v.Addr().Interface().(json.Unmarshaler); ok && !(hasFields && n.kind == yaml.MappingNode) {
		// A type with a short form decodes that itself; its long form, a
		// mapping, is taken apart here so that unknown keys have lines.
		if hasFields && n.kind != yaml.ScalarNode {
			d.want(n, "text or a mapping")
			return
		}
		if err := u.UnmarshalJSON(n.marshal()); err != nil {
			d.bad(n.line, n.path(), "%s", decodeHint(v.Type(), n, err))
		}
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		d.structure(n, v)
	case reflect.Map:
		d.dictionary(n, v)
	case reflect.Slice:
		if n.kind != yaml.SequenceNode {
			d.want(n, "a list")
			return
		}
		list := reflect.MakeSlice(v.Type(), len(n.items), len(n.items))
		for i, item := range n.items {
			d.decode(item, list.Index(i))
		}
		v.Set(list)
	default:
		d.scalar(n, v)
	}
}

func (d *decoder) want(n *node, what string) {
	d.bad(n.line, n.path(), "want %s, not %s", what, n.what())
}

func (d *decoder) structure(n *node, v reflect.Value) {
	if n.kind != yaml.MappingNode {
		d.want(n, "a mapping of keys to values")
		return
	}
	fields := structFields(v.Type())
	for _, f := range n.fields {
		index, ok := fields[f.key]
		if !ok {
			d.unknownKey(n, f, fields)
			continue
		}
		d.decode(f.value, v.FieldByIndex(index))
	}
	for _, key := range requiredKeys[v.Type()] {
		at := below(n.path(), key)
		if c := n.get(key); (c == nil || c.null()) && !d.told(at) {
			d.bad(n.line, at, "is missing")
		}
	}
}

// requiredKeys are those without which a mapping says nothing, or something
// nobody meant: an oomScores entry without its score must not become 0.
var requiredKeys = map[reflect.Type][]string{
	reflect.TypeFor[Mute]():                    {"reason"},
	reflect.TypeFor[override]():                {"nodeSelector"},
	reflect.TypeFor[MaintenanceWindow]():       {"from", "to"},
	reflect.TypeFor[probes.RequiredPackage]():  {"name"},
	reflect.TypeFor[probes.RequiredDevice]():   {"id"},
	reflect.TypeFor[probes.RequiredUnit]():     {"name"},
	reflect.TypeFor[probes.RequiredFile]():     {"path", "content"},
	reflect.TypeFor[probes.RequiredOOMScore](): {"unit", "score"},

	reflect.TypeFor[probes.RequiredMultipathDevice](): {"vendor", "product", "settings"},
}

func (d *decoder) dictionary(n *node, v reflect.Value) {
	if n.kind != yaml.MappingNode {
		d.want(n, "a mapping of keys to values")
		return
	}
	m := reflect.MakeMapWithSize(v.Type(), len(n.fields))
	for _, f := range n.fields {
		if f.value.null() {
			d.bad(f.line, f.value.path(), "has no value")
			continue
		}
		elem := reflect.New(v.Type().Elem()).Elem()
		d.decode(f.value, elem)
		m.SetMapIndex(reflect.ValueOf(f.key).Convert(v.Type().Key()), elem)
	}
	v.Set(m)
}

func (d *decoder) scalar(n *node, v reflect.Value) {
	if n.kind != yaml.ScalarNode {
		d.want(n, scalarWant(v.Kind()))
		return
	}
	switch v.Kind() {
	case reflect.String:
		// The literal text: mode: 0644 and kernel.pid_max: 131072 are meant as
		// they are written, whatever YAML takes them for.
		v.SetString(n.value)
	case reflect.Bool:
		b, ok := boolWord(n.value)
		if !ok {
			d.want(n, scalarWant(v.Kind()))
			return
		}
		v.SetBool(b)
	case reflect.Int, reflect.Int8, reflect.Int16, reflect.Int32, reflect.Int64:
		// Base 10 only: nobody who writes 0100 means 64.
		i, err := strconv.ParseInt(n.value, 10, v.Type().Bits())
		digits := strings.TrimLeft(n.value, "+-")
		if err != nil || n.tag == "!!str" || len(digits) > 1 && digits[0] == '0' {
			d.want(n, scalarWant(v.Kind()))
			return
		}
		v.SetInt(i)
	case reflect.Float32, reflect.Float64:
		f, err := strconv.ParseFloat(n.value, v.Type().Bits())
		if err != nil || n.tag == "!!str" || math.IsNaN(f) || math.IsInf(f, 0) {
			d.want(n, scalarWant(v.Kind()))
			return
		}
		v.SetFloat(f)
	default:
		d.bad(n.line, n.path(), "can not be set from a config (a %s)", v.Kind())
	}
}

func scalarWant(k reflect.Kind) string {
	switch k {
	case reflect.String:
		return "text"
	case reflect.Bool:
		return "true or false"
	case reflect.Float32, reflect.Float64:
		return "a number"
	}
	return "a whole number"
}

// decodeHint puts the errors of types that are not ours into our words.
func decodeHint(t reflect.Type, n *node, err error) string {
	switch t {
	case reflect.TypeFor[resource.Quantity]():
		return "want a size, such as 100Gi or 500G, not " + n.what()
	case reflect.TypeFor[time.Time]():
		return "want a time with its zone, such as 2026-12-01T00:00:00Z, not " + n.what()
	}
	return err.Error()
}

// structFields maps the JSON keys of a struct to its fields, those of embedded
// structs included.
func structFields(t reflect.Type) map[string][]int {
	if t.Kind() != reflect.Struct {
		return nil
	}
	fields := map[string][]int{}
	for i := range t.NumField() {
		f := t.Field(i)
		name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
		switch {
		case f.Anonymous && name == "":
			for key, index := range structFields(f.Type) {
				fields[key] = append([]int{i}, index...)
			}
		case f.IsExported() && name != "" && name != "-":
			fields[name] = []int{i}
		}
	}
	return fields
}

func (d *decoder) unknownKey(n *node, f field, known map[string][]int) {
	names := keysOf(known)
	path := below(n.path(), f.key)
	if d.full() {
		d.bad(f.line, path, "there is no such key")
		return
	}
	if c := nearest(f.key, names); c != "" {
		d.bad(f.line, path, "there is no such key: did you mean %s?", c)
		return
	}
	if places := placesOf(f.key); len(places) > 0 {
		d.bad(f.line, path, "there is no such key here: %s belongs to %s", f.key, strings.Join(places, " or "))
		return
	}
	d.bad(f.line, path, "there is no such key: want one of %s", strings.Join(names, ", "))
}

func keysOf(fields map[string][]int) []string {
	names := make([]string, 0, len(fields))
	for name := range fields {
		names = append(names, name)
	}
	slices.Sort(names)
	return names
}

// placesOf returns the mappings of the config that have a key, at most three.
func placesOf(key string) []string {
	var places []string
	var walk func(t reflect.Type, path string)
	walk = func(t reflect.Type, path string) {
		for t.Kind() == reflect.Pointer || t.Kind() == reflect.Slice {
			if t.Kind() == reflect.Slice {
				path += "[]"
			}
			t = t.Elem()
		}
		fields := structFields(t)
		for _, name := range keysOf(fields) {
			if name == key && path != "" {
				places = append(places, path)
			}
			walk(t.FieldByIndex(fields[name]).Type, below(path, name))
		}
	}
	walk(reflect.TypeFor[AgentConfig](), "")
	if len(places) > 3 {
		return nil
	}
	return places
}

// override is one entry of overrides: as the tree is checked. What it holds is
// merged as a tree, never as this struct, which can not tell a missing key from
// a zero.
type override struct {
	// NodeSelector are the labels a node must have, all of them.
	NodeSelector map[string]string `json:"nodeSelector"`
	Sections
}

// document is the whole file.
type document struct {
	AgentConfig
	// Overrides change settings on the nodes whose labels they select; later
	// ones win, key by key.
	Overrides []override `json:"overrides,omitempty"`
}

// without returns a mapping that lacks some keys.
func (n *node) without(keys ...string) *node {
	c := *n
	c.fields = slices.DeleteFunc(slices.Clone(n.fields), func(f field) bool { return slices.Contains(keys, f.key) })
	return &c
}
