package config

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/invopop/jsonschema"
	"k8s.io/apimachinery/pkg/api/resource"
	"sigs.k8s.io/yaml"

	"github.com/hosthygiene/agent/pkg/finding"
	"github.com/hosthygiene/agent/pkg/probes"
)

const schemaFile = "../../docs/config.schema.json"

// TestSchema keeps docs/config.schema.json in step with the types. The
// generator lives in a test so that it is not in the agent.
func TestSchema(t *testing.T) {
	golden(t, schemaFile, string(generateSchema(t)))
}

// Durations as time.ParseDuration has them, without those below zero, which no
// key takes.
const durationPattern = `^([0-9]+(\.[0-9]*)?(ns|us|µs|ms|s|m|h))+$|^0$`

func generateSchema(t *testing.T) []byte {
	t.Helper()
	r := &jsonschema.Reflector{
		Anonymous:                  true,
		ExpandedStruct:             true,
		RequiredFromJSONSchemaTags: true,
		Mapper:                     ownForms,
		Namer: func(typ reflect.Type) string {
			if typ == reflect.TypeFor[time.Time]() {
				return "Timestamp" // or it would be taken for probes.Time
			}
			return ""
		},
	}
	for _, dir := range []string{"config", "probes"} {
		if err := comments(r, dir); err != nil {
			t.Fatal(err)
		}
	}
	s := r.Reflect(document{})
	s.Title = "AgentConfig of the host-hygiene agent"
	s.Description = ""
	s.Required = []string{"apiVersion", "kind"}
	property(t, s, "apiVersion").Enum = []any{APIVersion}
	property(t, s, "kind").Enum = []any{Kind}

	reasons := []any{}
	for reason := range Rules() {
		reasons = append(reasons, reason)
	}
	slices.SortFunc(reasons, func(a, b any) int { return strings.Compare(a.(string), b.(string)) })
	enum := func(words []string) *jsonschema.Schema {
		e := &jsonschema.Schema{Type: "string"}
		for _, w := range words {
			e.Enum = append(e.Enum, w)
		}
		return e
	}
	ready := enum([]string{wordCritical})
	ready.Enum = append(ready.Enum, reasons...)
	report := s.Definitions["Report"]
	*property(t, report, "readyReasons") = jsonschema.Schema{
		AnyOf:       []*jsonschema.Schema{enum([]string{wordCritical}), {Type: "array", Items: ready, UniqueItems: true}},
		Description: property(t, report, "readyReasons").Description,
	}
	property(t, s.Definitions["Mute"], "reason").Enum = reasons
	for _, top := range []*jsonschema.Schema{s, s.Definitions["override"]} {
		for _, key := range []string{"severity", "hold"} {
			property(t, top, key).PropertyNames = &jsonschema.Schema{Enum: reasons}
		}
		property(t, top, "severity").AdditionalProperties = enum([]string{"info", "warning", "critical"})
		profiles := property(t, top, "storageProfiles")
		// No enum: profiles of the user's own have names of their own.
		names := &jsonschema.Schema{Type: "string", Pattern: profileName.String()}
		for _, name := range StorageProfiles() {
			names.Examples = append(names.Examples, name)
		}
		profiles.Items, profiles.UniqueItems = names, true
		property(t, top, "profiles").PropertyNames = &jsonschema.Schema{Pattern: profileName.String()}
	}
	allow := property(t, s.Definitions["Remedies"], "allow")
	allow.Items, allow.UniqueItems = enum(RemedyKinds()), true
	window := s.Definitions["MaintenanceWindow"]
	days := property(t, window, "days")
	days.Items, days.UniqueItems = enum(Weekdays()), true
	property(t, window, "from").Pattern = timeOfDay.String()
	property(t, window, "to").Pattern = timeOfDay.String()

	for typ, keys := range requiredKeys {
		s.Definitions[typ.Name()].Required = keys
	}
	one := uint64(1)
	property(t, s.Definitions["override"], "nodeSelector").MinProperties = &one
	// The short form of a package is its name.
	long := s.Definitions["RequiredPackage"]
	s.Definitions["RequiredPackage"] = &jsonschema.Schema{
		AnyOf:       []*jsonschema.Schema{{Type: "string"}, long},
		Description: long.Description,
	}
	long.Description = ""
	defaults(t, s)

	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	enc.SetIndent("", "  ")
	if err := enc.Encode(s); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// ownForms are the schemas of types that decode themselves.
func ownForms(typ reflect.Type) *jsonschema.Schema {
	switch typ {
	case reflect.TypeFor[probes.Duration]():
		return &jsonschema.Schema{Type: "string", Pattern: durationPattern}
	case reflect.TypeFor[probes.Percent]():
		return &jsonschema.Schema{Type: "string", Pattern: `^(100(\.0*)?|[0-9]{1,2}(\.[0-9]*)?)%$`}
	case reflect.TypeFor[resource.Quantity]():
		return &jsonschema.Schema{
			AnyOf: []*jsonschema.Schema{
				{Type: "string", Pattern: `^[0-9]+(\.[0-9]*)?([KMGTPE]i|[mkMGTPE]|[eE][0-9]+)?$`},
				{Type: "integer", Minimum: "1"},
			},
		}
	case reflect.TypeFor[Switch]():
		return &jsonschema.Schema{Enum: []any{"on", "off", true, false}}
	case reflect.TypeFor[Mode]():
		return &jsonschema.Schema{Enum: []any{ModeOff, ModePlan, ModeEnforce, false}}
	case reflect.TypeFor[map[string]string]():
		// Text is taken as it is written, so that a number needs no quotes.
		return &jsonschema.Schema{Type: "object", AdditionalProperties: &jsonschema.Schema{
			AnyOf: []*jsonschema.Schema{{Type: "string"}, {Type: "number"}, {Type: "boolean"}},
		}}
	case reflect.TypeFor[time.Time]():
		return &jsonschema.Schema{Type: "string", Format: "date-time"}
	case reflect.TypeFor[finding.Severity]():
		return &jsonschema.Schema{Type: "string"}
	}
	return nil
}

// comments takes descriptions from the doc comments of a package beside this.
func comments(r *jsonschema.Reflector, dir string) error {
	wd, err := os.Getwd()
	if err != nil {
		return err
	}
	defer os.Chdir(wd)
	if err := os.Chdir(".."); err != nil { // the package path is made of the folder's
		return err
	}
	if err := r.AddGoComments("github.com/hosthygiene/agent/pkg", dir, jsonschema.WithFullComment()); err != nil {
		return err
	}
	// Links of doc comments say nothing to an editor.
	for k, v := range r.CommentMap {
		r.CommentMap[k] = strings.NewReplacer("[", "", "]", "", "\n", " ").Replace(v)
	}
	return nil
}

func property(t *testing.T, s *jsonschema.Schema, key string) *jsonschema.Schema {
	t.Helper()
	if s == nil {
		t.Fatalf("no schema that could have %s", key)
	}
	p, ok := s.Properties.Get(key)
	if !ok {
		t.Fatalf("no property %s", key)
	}
	return p
}

// defaults writes the defaults beside what they are of.
func defaults(t *testing.T, s *jsonschema.Schema) {
	t.Helper()
	data, err := json.Marshal(Default())
	if err != nil {
		t.Fatal(err)
	}
	var values map[string]any
	if err := json.Unmarshal(data, &values); err != nil {
		t.Fatal(err)
	}
	var fill func(s *jsonschema.Schema, values map[string]any)
	fill = func(at *jsonschema.Schema, values map[string]any) {
		for pair := at.Properties.Oldest(); pair != nil; pair = pair.Next() {
			v, ok := values[pair.Key]
			if !ok || pair.Key == "apiVersion" || pair.Key == "kind" {
				continue
			}
			if below, ok := v.(map[string]any); ok {
				name := strings.TrimPrefix(pair.Value.Ref, "#/$defs/")
				if def := s.Definitions[name]; def != nil && def.Properties != nil {
					fill(def, below)
				}
				continue
			}
			pair.Value.Default = v
		}
	}
	fill(s, values)
}

// TestSchemaAccepts holds the schema against configs that are good, and against
// bad ones whose mistake a schema can see.
func TestSchemaAccepts(t *testing.T) {
	var schema map[string]any
	if err := json.Unmarshal(generateSchema(t), &schema); err != nil {
		t.Fatal(err)
	}
	decode := func(data []byte) any {
		t.Helper()
		var v any
		if err := yaml.Unmarshal(data, &v); err != nil {
			t.Fatal(err)
		}
		return v
	}
	// testdata/good/traps.yaml is not among them: the parser forgives what YAML
	// does to careless writing, the schema shows how to write it.
	for _, file := range []string{"testdata/good/contract.yaml", "../../examples/config.yaml"} {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		for _, problem := range against(schema, schema, decode(data), "config") {
			t.Errorf("%s: %s", file, problem)
		}
	}
	own, err := Default().YAML()
	if err != nil {
		t.Fatal(err)
	}
	for _, problem := range against(schema, schema, decode(own), "config") {
		t.Errorf("the defaults: %s", problem)
	}
	for _, name := range []string{"unknown-key", "wrong-unit", "wrong-type", "header-missing", "header-version", "switch", "reasons", "profiles", "remedies", "remedies-window-incomplete", "overrides", "a-list"} {
		data, err := os.ReadFile("testdata/bad/" + name + ".yaml")
		if err != nil {
			t.Fatal(err)
		}
		if len(against(schema, schema, decode(data), "config")) == 0 {
			t.Errorf("the schema accepts testdata/bad/%s.yaml", name)
		}
	}
}

// against holds a value against the part of JSON Schema that the generator
// uses, and objects to a keyword it does not know.
func against(root, s map[string]any, v any, path string) (problems []string) {
	bad := func(format string, args ...any) {
		problems = append(problems, path+": "+fmt.Sprintf(format, args...))
	}
	sub := func(s any, v any, path string) {
		switch s := s.(type) {
		case map[string]any:
			problems = append(problems, against(root, s, v, path)...)
		case bool:
			if !s {
				problems = append(problems, path+": not allowed")
			}
		}
	}
	object, _ := v.(map[string]any)
	list, _ := v.([]any)
	text, isText := v.(string)
	known, _ := s["properties"].(map[string]any)
	for keyword, arg := range s {
		switch keyword {
		case "$schema", "$defs", "title", "description", "default", "format", "examples":
		case "$ref":
			name := strings.TrimPrefix(arg.(string), "#/$defs/")
			def, ok := root["$defs"].(map[string]any)[name]
			if !ok {
				bad("no definition %s", name)
			}
			sub(def, v, path)
		case "type":
			is := map[string]bool{"object": object != nil, "array": v != nil && list != nil, "string": isText}
			switch n := v.(type) {
			case float64:
				is["number"], is["integer"] = true, n == float64(int64(n))
			case bool:
				is["boolean"] = true
			case []any:
				is["array"] = true
			}
			if !is[arg.(string)] {
				bad("want %s, not %v", arg, v)
			}
		case "enum":
			if !slices.Contains(arg.([]any), v) {
				bad("%v is none of %v", v, arg)
			}
		case "pattern":
			if isText && !regexp.MustCompile(arg.(string)).MatchString(text) {
				bad("%q does not match %s", text, arg)
			}
		case "minimum":
			if n, ok := v.(float64); ok && n < arg.(float64) {
				bad("%v is below %v", n, arg)
			}
		case "required":
			for _, key := range arg.([]any) {
				if _, ok := object[key.(string)]; !ok && object != nil {
					bad("%s is missing", key)
				}
			}
		case "minProperties":
			if object != nil && float64(len(object)) < arg.(float64) {
				bad("want at least %v keys", arg)
			}
		case "properties":
			for key, value := range object {
				if known[key] != nil {
					sub(known[key], value, path+"."+key)
				}
			}
		case "additionalProperties":
			for key, value := range object {
				if known[key] == nil {
					sub(arg, value, path+"."+key)
				}
			}
		case "propertyNames":
			for key := range object {
				sub(arg, key, path+"."+key)
			}
		case "items":
			for i, item := range list {
				sub(arg, item, fmt.Sprintf("%s[%d]", path, i))
			}
		case "uniqueItems":
			for i, item := range list {
				if slices.ContainsFunc(list[:i], func(o any) bool { return reflect.DeepEqual(o, item) }) {
					bad("%v is there twice", item)
				}
			}
		case "anyOf":
			fits := slices.ContainsFunc(arg.([]any), func(s any) bool {
				return len(against(root, s.(map[string]any), v, path)) == 0
			})
			if !fits {
				bad("%v fits none of %v", v, arg)
			}
		default:
			bad("the keyword %s is not known to this test", keyword)
		}
	}
	return problems
}
