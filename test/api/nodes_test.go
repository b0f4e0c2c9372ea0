//go:build cluster

package api

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/hosthygiene/agent/pkg/probes"
)

// caller makes requests as they are on the wire: an agent that is taken over
// does not use our client.
type caller struct {
	server string
	client *http.Client
}

func (c *cluster) caller(config *rest.Config) caller {
	c.t.Helper()
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		c.t.Fatal(err)
	}
	return caller{c.Server(), client}
}

func (c *cluster) withToken(token string) caller {
	c.t.Helper()
	config := rest.CopyConfig(c.agent)
	config.BearerToken = token
	return c.caller(config)
}

func (c *cluster) administrator() caller {
	c.t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig())
	if err != nil {
		c.t.Fatal(err)
	}
	return c.caller(config)
}

// The content types of patches, and of objects.
const (
	mergePatch     = "application/merge-patch+json"
	strategicPatch = "application/strategic-merge-patch+json"
	jsonPatch      = "application/json-patch+json"
	applyPatch     = "application/apply-patch+yaml"
	object         = "application/json"
)

// do returns the code of the answer, the object in it, and the server's message
// when it is a Status.
func (c caller) do(t *testing.T, method, path, contentType, body string) (code int, answer map[string]any, message string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, c.server+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", contentType)
	resp, err := c.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	data, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	if json.Unmarshal(data, &answer) != nil {
		return resp.StatusCode, nil, string(data)
	}
	message, _ = answer["message"].(string)
	return resp.StatusCode, answer, message
}

func (c caller) node(t *testing.T, name string) map[string]any {
	t.Helper()
	code, node, message := c.do(t, http.MethodGet, "/api/v1/nodes/"+name, "", "")
	if code != http.StatusOK {
		t.Fatalf("reading node %s: %d %s", name, code, message)
	}
	return node
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// deniedBy says whether an answer is the policy's, and why is its reason.
func deniedBy(code int, message, why string) bool {
	_, reason, ok := strings.Cut(message, "ValidatingAdmissionPolicy 'host-hygiene-agent-nodes' with binding 'host-hygiene-agent-nodes' denied request: ")
	return ok && code == http.StatusUnprocessableEntity && strings.Contains(reason, why)
}

// waitForNodePolicy: a policy is in force some moments after it was applied.
func (c *cluster) waitForNodePolicy(agent caller, node string) {
	c.t.Helper()
	code, message := 0, ""
	for deadline := time.Now().Add(60 * time.Second); time.Now().Before(deadline); time.Sleep(200 * time.Millisecond) {
		code, _, message = agent.do(c.t, http.MethodPatch, "/api/v1/nodes/"+node+"/status?dryRun=All", mergePatch, `{"status":{"phase":"Probe"}}`)
		if deniedBy(code, message, "status.phase") {
			return
		}
	}
	c.t.Fatalf("the admission policy is not in force after 60s: %d %s", code, message)
}

// example fills a value of any type of the API, another for each n. It must be
// one that the server takes: what it refuses proves nothing about the policy.
func example(t *testing.T, v reflect.Value, path string, n int) {
	t.Helper()
	switch special := v.Addr().Interface().(type) {
	case *resource.Quantity:
		*special = resource.MustParse(fmt.Sprint(n))
		return
	case *metav1.Time:
		*special = metav1.Date(2026, 1, n, 0, 0, 0, 0, time.UTC)
		return
	case *metav1.FieldsV1:
		special.SetRawString(fmt.Sprintf(`{"f:status":{"f:x%d":{}}}`, n))
		return
	case *corev1.ResourceList:
		if path == "status.allocatable" { // the capacity where there is none
			n += 10
		}
		*special = corev1.ResourceList{corev1.ResourceCPU: resource.MustParse(fmt.Sprint(n))}
		return
	}
	if text, ok := map[string]string{
		"metadata.resourceVersion":            "%d",
		"metadata.finalizers[]":               "example.com/x%d",
		"metadata.managedFields[].operation":  "Update",
		"metadata.managedFields[].fieldsType": "FieldsV1",
		"metadata.managedFields[].apiVersion": "v1",
		"status.declaredFeatures[]":           "Feature%d",
	}[path]; ok {
		v.SetString(strings.ReplaceAll(text, "%d", fmt.Sprint(n)))
		return
	}
	switch v.Kind() {
	case reflect.String:
		v.SetString(fmt.Sprintf("x%d", n))
	case reflect.Int, reflect.Int32, reflect.Int64:
		v.SetInt(int64(n))
	case reflect.Bool:
		v.SetBool(n%2 == 0)
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		example(t, v.Elem(), path, n)
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		example(t, v.Index(0), path+"[]", n)
	case reflect.Map:
		value := reflect.New(v.Type().Elem()).Elem()
		example(t, value, path, n)
		v.Set(reflect.MakeMap(v.Type()))
		v.SetMapIndex(reflect.ValueOf("example.com/x").Convert(v.Type().Key()), value)
	case reflect.Struct:
		for i := range v.NumField() {
			example(t, v.Field(i), path+"."+jsonName(v.Type().Field(i)), n)
		}
	default:
		t.Fatalf("%s: no example of a %s", path, v.Type())
	}
}

func jsonName(f reflect.StructField) string {
	name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
	return name
}

// nodeField is a field of a Node's metadata or status, with two values as JSON.
type nodeField struct {
	part, name string
	values     [2]json.RawMessage
}

func (f nodeField) String() string { return f.part + "." + f.name }

// of is the field's value in a Node; nil when it has none.
func (f nodeField) of(node map[string]any) any {
	part, _ := node[f.part].(map[string]any)
	return part[f.name]
}

// nodeFields are all of ObjectMeta and NodeStatus, as this version of the API
// has them.
func nodeFields(t *testing.T) []nodeField {
	t.Helper()
	var fields []nodeField
	for part, kind := range map[string]reflect.Type{
		"metadata": reflect.TypeFor[metav1.ObjectMeta](),
		"status":   reflect.TypeFor[corev1.NodeStatus](),
	} {
		for i := range kind.NumField() {
			f := nodeField{part: part, name: jsonName(kind.Field(i))}
			if f.name == "" {
				t.Fatalf("the fields of %s in %s are not enumerated", kind.Field(i).Name, kind)
			}
			for n := range f.values {
				v := reflect.New(kind.Field(i).Type)
				example(t, v.Elem(), f.String(), n+1)
				f.values[n] = json.RawMessage(marshal(t, v.Interface()))
			}
			fields = append(fields, f)
		}
	}
	return fields
}

// serverKeeps are the fields that the API server itself lets nobody change
// through the status subresource, an administrator neither.
var serverKeeps = map[string]string{
	"metadata.name":                       "the one in the URL",
	"metadata.namespace":                  "a Node has none",
	"metadata.uid":                        "immutable",
	"metadata.resourceVersion":            "a precondition",
	"metadata.generation":                 "the server counts",
	"metadata.creationTimestamp":          "immutable",
	"metadata.deletionTimestamp":          "immutable",
	"metadata.deletionGracePeriodSeconds": "immutable",
	"metadata.managedFields":              "the server's own, ignored in a request for a subresource",
	"metadata.selfLink removed":           "in the answer to a write only, and never stored",
	"status.config":                       "dropped where there is none (dynamic kubelet configuration is gone since 1.24)",
}

// Every field of a Node's metadata and status, set where there was nothing,
// changed, and taken away. An administrator tries each first, so that what is
// denied is known to have an effect otherwise.
func TestNodeAdmissionByField(t *testing.T) {
	c := start(t)
	agents := map[string]caller{}
	for _, name := range []string{"bare", "full", "leaving"} {
		agents[name] = c.withToken(c.podToken(name))
	}
	admin := c.administrator()
	fields := nodeFields(t)

	// A pod needs its node first, so that one is filled afterwards.
	full := map[string]map[string]json.RawMessage{"metadata": {}, "status": {}}
	for _, f := range fields {
		if serverKeeps[f.String()] == "" {
			full[f.part][f.name] = f.values[0]
		}
	}
	for _, step := range []struct{ method, path, contentType, body string }{
		{http.MethodPatch, "full/status", mergePatch, marshal(t, full)},
		{http.MethodPatch, "leaving", mergePatch, `{"metadata":{"finalizers":["example.com/x"]}}`},
		{http.MethodDelete, "leaving", object, ""},
	} {
		if code, _, message := admin.do(t, step.method, "/api/v1/nodes/"+step.path, step.contentType, step.body); code != http.StatusOK {
			t.Fatalf("%s %s: %d %s", step.method, step.path, code, message)
		}
	}
	c.waitForNodePolicy(agents["bare"], "bare")

	denied, kept := 0, map[string]bool{}
	for _, f := range fields {
		for _, tc := range []struct {
			what, node string
			value      json.RawMessage
		}{
			{"set", "bare", f.values[1]},
			{"changed", "full", f.values[1]},
			{"removed", "full", json.RawMessage("null")},
		} {
			t.Run(f.String()+" "+tc.what, func(t *testing.T) {
				if strings.HasPrefix(f.name, "deletion") && tc.node == "full" {
					tc.node = "leaving"
				}
				path := "/api/v1/nodes/" + tc.node + "/status"
				patch := marshal(t, map[string]any{f.part: map[string]any{f.name: tc.value}})
				before := admin.node(t, tc.node)
				code, would, refusal := admin.do(t, http.MethodPatch, path+"?dryRun=All", mergePatch, patch)
				effect := code == http.StatusOK && !cmp.Equal(f.of(before), f.of(would))
				code, _, message := agents[tc.node].do(t, http.MethodPatch, path, mergePatch, patch)
				why := f.String()
				if f.name == "conditions" {
					why = "condition x"
				}
				id := f.String()
				if serverKeeps[id] == "" {
					id += " " + tc.what
				}
				switch keeps := serverKeeps[id]; {
				case keeps != "" && effect:
					t.Errorf("an administrator can do it, which the server was to keep him from (%s)", keeps)
				case keeps != "":
					kept[id] = true
				case !effect:
					t.Errorf("an administrator can not do it either, so it proves nothing: %s", refusal)
				case !deniedBy(code, message, why):
					t.Errorf("want the policy to deny it: %d %s", code, message)
				default:
					denied++
				}
				if d := cmp.Diff(withoutNotes(before), withoutNotes(admin.node(t, tc.node))); d != "" {
					t.Errorf("the node is another:\n%s", d)
				}
			})
		}
	}
	t.Logf("%d fields, three writes each: %d denied by the policy, the others without effect for anybody", len(fields), denied)
	if len(kept) != len(serverKeeps) {
		t.Errorf("the server keeps %v, want all of %v", kept, serverKeeps)
	}
}

// withoutNotes takes out what the API server notes about a write, even of one
// that wrote nothing.
func withoutNotes(node map[string]any) map[string]any {
	metadata := node["metadata"].(map[string]any)
	delete(metadata, "managedFields")
	delete(metadata, "resourceVersion")
	return node
}

// What an agent may write, how, and as whom.
func TestNodeAdmission(t *testing.T) {
	c := start(t)
	n1, n2 := c.withToken(c.podToken("n1")), c.withToken(c.podToken("n2"))
	unbound := c.withToken(c.token())
	unscheduled := c.withToken(c.podToken(""))
	admin := c.administrator()
	c.waitForNodePolicy(n1, "n1")

	const (
		at       = `"lastHeartbeatTime":"2026-01-01T00:00:00Z","lastTransitionTime":"2026-01-01T00:00:00Z","reason":"R","message":"m"`
		ready    = `{"type":"Ready","status":"True",` + at + `}`
		pressure = `{"type":"DiskPressure","status":"False",` + at + `}`
		ours     = `{"type":"` + probes.ConditionPrefix + `TimeProblem","status":"False",` + at + `}`
		ours2    = `{"type":"` + probes.ConditionPrefix + `TimeProblem","status":"True",` + at + `}`
		more     = `{"type":"` + probes.ConditionPrefix + `DiskProblem","status":"False",` + at + `}`
		status   = "/api/v1/nodes/n1/status"
	)
	conditions := func(list ...string) string { return `{"status":{"conditions":[` + strings.Join(list, ",") + `]}}` }
	deletion := func(kind string) string { return `{"$patch":"delete","type":"` + kind + `"}` }
	// Each begins with Ready, DiskPressure and TimeProblem, in this order.
	for _, tc := range []struct {
		name                    string
		as                      caller
		path, contentType, body string
		denied                  string // why; empty when it must be allowed
	}{
		{"changes ours", n1, status, strategicPatch, conditions(ours2), ""},
		{"adds one of ours", n1, status, strategicPatch, conditions(more), ""},
		{"deletes ours", n1, status, strategicPatch, conditions(deletion(probes.ConditionPrefix + "TimeProblem")), ""},
		{"all of it at once", n1, status, strategicPatch, conditions(more, deletion(probes.ConditionPrefix+"TimeProblem")), ""},
		{"adds ours before the others", n1, status, jsonPatch, `[{"op":"add","path":"/status/conditions/0","value":` + more + `}]`, ""},
		{"writes the others as they are, in another order", n1, status, mergePatch, conditions(ours2, pressure, ready), ""},
		{"applies one of ours", n1, status + "?fieldManager=x", applyPatch, `{"apiVersion":"v1","kind":"Node",` + conditions(more)[1:], ""},
		{"writes for show", n1, status + "?dryRun=All", strategicPatch, conditions(ours2), ""},

		{"changes another's", n1, status, strategicPatch, conditions(`{"type":"Ready","status":"False"}`), "condition Ready"},
		{"changes another's time", n1, status, strategicPatch, conditions(`{"type":"Ready","lastHeartbeatTime":"2026-01-01T00:00:01Z"}`), "condition Ready"},
		{"deletes another's", n1, status, strategicPatch, conditions(deletion("DiskPressure")), "condition DiskPressure"},
		{"adds another's", n1, status, strategicPatch, conditions(`{"type":"NetworkUnavailable","status":"False"}`), "condition NetworkUnavailable"},
		{"hides another's change among ours", n1, status, strategicPatch, conditions(ours2, more, deletion("DiskPressure")), "condition DiskPressure"},
		{"makes another's ours", n1, status, jsonPatch, `[{"op":"replace","path":"/status/conditions/0/type","value":"` + probes.ConditionPrefix + `Ready"}]`, "condition Ready"},
		{"makes ours another's", n1, status, jsonPatch, `[{"op":"replace","path":"/status/conditions/2/type","value":"Ready"}]`, "condition Ready"},
		{"repeats another's", n1, status, jsonPatch, `[{"op":"copy","from":"/status/conditions/0","path":"/status/conditions/-"}]`, "repeats"},
		{"trades one for another", n1, status, mergePatch, conditions(ready, ready, ours), "condition DiskPressure"},
		{"empties the list", n1, status, mergePatch, conditions(), "condition Ready, condition DiskPressure"},
		{"takes the list away", n1, status, mergePatch, `{"status":{"conditions":null}}`, "condition Ready, condition DiskPressure"},
		{"replaces the status", n1, status, jsonPatch, `[{"op":"replace","path":"/status","value":{}}]`, "status.capacity"},
		{"takes the prefix without the slash", n1, status, strategicPatch, conditions(`{"type":"hosthygiene.io","status":"False"}`), "condition hosthygiene.io"},
		{"puts something before the prefix", n1, status, strategicPatch, conditions(`{"type":"x.hosthygiene.io/TimeProblem","status":"False"}`), "condition x.hosthygiene.io/TimeProblem"},
		{"writes the prefix in capitals", n1, status, strategicPatch, conditions(`{"type":"HostHygiene.io/TimeProblem","status":"False"}`), "condition HostHygiene.io/TimeProblem"},

		{"one more resource, strategic", n1, status, strategicPatch, `{"status":{"capacity":{"example.com/gpu":"8"}}}`, "status.capacity"},
		{"one more resource, merged", n1, status, mergePatch, `{"status":{"capacity":{"example.com/gpu":"8"}}}`, "status.capacity"},
		{"one more resource, JSON patch", n1, status, jsonPatch, `[{"op":"add","path":"/status/capacity/example.com~1gpu","value":"8"}]`, "status.capacity"},
		{"one more resource, applied", n1, status + "?fieldManager=x&force=true", applyPatch, `{"apiVersion":"v1","kind":"Node","status":{"capacity":{"example.com/gpu":"8"}}}`, "status.capacity"},
		{"one more resource, for show", n1, status + "?dryRun=All", mergePatch, `{"status":{"capacity":{"example.com/gpu":"8"}}}`, "status.capacity"},
		{"a label, applied", n1, status + "?fieldManager=x&force=true", applyPatch, `{"apiVersion":"v1","kind":"Node","metadata":{"labels":{"pool":"x"}}}`, "metadata.labels"},
		{"a resource beside ours", n1, status, strategicPatch, `{"status":{"capacity":{"example.com/gpu":"8"},"conditions":[` + ours2 + `]}}`, "this changes status.capacity"},
		{"two things", n1, status, strategicPatch, `{"metadata":{"labels":{"pool":"x"}},"status":{"phase":"Running"}}`, "this changes metadata.labels, status.phase"},

		{"another's node", n2, status, strategicPatch, conditions(ours2), "the agent of node n2 writes the status of that node only, and this is n1"},
		{"a token that is bound to no pod", unbound, status, strategicPatch, conditions(ours2), "the token is not bound to a pod on a node"},
		{"a token of a pod on no node", unscheduled, status, strategicPatch, conditions(ours2), "the token is not bound to a pod on a node"},

		{"an administrator changes another's", admin, status, strategicPatch, conditions(`{"type":"Ready","status":"False"}`), ""},
		{"an administrator adds a resource", admin, status, mergePatch, `{"status":{"capacity":{"example.com/gpu":"8"}}}`, ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			reset := `{"metadata":{"labels":{"pool":"storage"}},"status":{"phase":"Pending","capacity":{"cpu":"1","example.com/gpu":null},"conditions":[` + strings.Join([]string{ready, pressure, ours}, ",") + `]}}`
			if code, _, message := admin.do(t, http.MethodPatch, status, mergePatch, reset); code != http.StatusOK {
				t.Fatalf("%d %s", code, message)
			}
			before := admin.node(t, "n1")
			code, answer, message := tc.as.do(t, http.MethodPatch, tc.path, tc.contentType, tc.body)
			after := admin.node(t, "n1")
			changed := cmp.Diff(withoutNotes(before), withoutNotes(after))
			if tc.denied != "" {
				if !deniedBy(code, message, tc.denied) {
					t.Errorf("want the policy to deny it because of %q: %d %s", tc.denied, code, message)
				}
				if changed != "" {
					t.Errorf("the node is another:\n%s", changed)
				}
				return
			}
			if code != http.StatusOK {
				t.Fatalf("%d %s", code, message)
			}
			if strings.Contains(tc.path, "dryRun") {
				after = answer
			}
			if cmp.Equal(before, withoutNotes(after)) {
				t.Error("it changed nothing")
			}
		})
	}
}

// Should RBAC ever grant the agent all of Nodes, by mistake or by somebody else's
// role, the policy still leaves it its own conditions.
func TestNodeAdmissionHoldsWithoutRBAC(t *testing.T) {
	c := start(t)
	n1 := c.withToken(c.podToken("n1"))
	c.makeNode("n2")
	admin := c.administrator()
	c.waitForNodePolicy(n1, "n1")
	const path = "/api/v1/nodes/n1"
	if code, _, message := n1.do(t, http.MethodPatch, path, mergePatch, `{"spec":{"unschedulable":true}}`); code != http.StatusForbidden || !strings.Contains(message, "cannot patch resource") {
		t.Fatalf("with the rights of the manifests: %d %s", code, message)
	}
	c.kubectl("create", "clusterrolebinding", "too-much", "--clusterrole=cluster-admin", "--serviceaccount=host-hygiene:host-hygiene-agent")
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		code, _, message := n1.do(t, http.MethodPost, "/api/v1/namespaces?dryRun=All", object, `{"metadata":{"name":"any"}}`)
		if code == http.StatusCreated {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the role is not in force: %d %s", code, message)
		}
	}

	edited := func(edit func(metadata, status map[string]any)) string {
		node := admin.node(t, "n1")
		edit(node["metadata"].(map[string]any), node["status"].(map[string]any))
		return marshal(t, node)
	}
	const status = "an agent writes nothing of a Node but its status"
	for _, tc := range []struct{ name, method, path, contentType, body, denied string }{
		{"cordons its node", http.MethodPatch, path, mergePatch, `{"spec":{"unschedulable":true}}`, status},
		{"labels its node", http.MethodPatch, path, mergePatch, `{"metadata":{"labels":{"pool":"x"}}}`, status},
		{"writes the same", http.MethodPut, path, object, edited(func(_, _ map[string]any) {}), status},
		{"deletes its node", http.MethodDelete, path, object, "", status},
		{"deletes another node", http.MethodDelete, "/api/v1/nodes/n2", object, "", status},
		{"deletes all nodes", http.MethodDelete, "/api/v1/nodes", object, "", status},
		{"makes a node", http.MethodPost, "/api/v1/nodes", object, `{"metadata":{"name":"n3"}}`, status},
		{"reaches through to the kubelet", http.MethodGet, path + "/proxy/pods", "", "", status},
		{"writes its whole status", http.MethodPut, path + "/status", object, edited(func(_, s map[string]any) { s["phase"] = "Running" }), "status.phase"},
		{"writes it whatever it was", http.MethodPut, path + "/status", object, edited(func(m, s map[string]any) { delete(m, "resourceVersion"); s["phase"] = "Running" }), "status.phase"},
		{"writes another's status", http.MethodPatch, "/api/v1/nodes/n2/status", strategicPatch, `{"status":{"conditions":[{"type":"` + probes.ConditionPrefix + `Ready","status":"True"}]}}`, "the agent of node n1 writes"},
		{"writes its own conditions", http.MethodPut, path + "/status", object, edited(func(_, s map[string]any) {
			s["conditions"] = []any{map[string]any{"type": probes.ConditionPrefix + "Ready", "status": "True"}}
		}), ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			before := admin.node(t, "n1")
			code, _, message := n1.do(t, tc.method, tc.path, tc.contentType, tc.body)
			if tc.denied == "" {
				if code != http.StatusOK {
					t.Errorf("%d %s", code, message)
				}
				return
			}
			if !deniedBy(code, message, tc.denied) {
				t.Errorf("want the policy to deny it: %d %s", code, message)
			}
			if d := cmp.Diff(before, admin.node(t, "n1")); d != "" {
				t.Errorf("the node is another:\n%s", d)
			}
			admin.node(t, "n2")
		})
	}
}

// The API server has a budget for the expressions of a policy, beyond which it
// would deny every write. A Node as large as they come is within it, and what the
// policy costs stands in the log: for the agent's writes, and for those of others,
// of whom it only looks at the name.
func TestNodeAdmissionOfALargeNode(t *testing.T) {
	c := start(t)
	agents := map[string]caller{"usual": c.withToken(c.podToken("usual")), "large": c.withToken(c.podToken("large"))}
	admin := c.administrator()
	usual := admin.filled(t, "usual", 10, 20)
	large := admin.filled(t, "large", 300, 250)
	c.waitForNodePolicy(agents["usual"], "usual")
	for _, tc := range []struct {
		node, who string
		bytes     int
		as        caller
	}{
		{"usual", "the agent", usual, agents["usual"]}, {"usual", "another", usual, admin},
		{"large", "the agent", large, agents["large"]}, {"large", "another", large, admin},
	} {
		const writes = 40
		count, seconds := c.admissions(t, admin)
		for i := range writes {
			patch := fmt.Sprintf(`{"status":{"conditions":[{"type":"%sReady","status":"True","reason":"R%d"}]}}`, probes.ConditionPrefix, i)
			if code, _, message := tc.as.do(t, http.MethodPatch, "/api/v1/nodes/"+tc.node+"/status", strategicPatch, patch); code != http.StatusOK {
				t.Fatalf("%d %s", code, message)
			}
		}
		countAfter, secondsAfter := c.admissions(t, admin)
		t.Logf("a Node of %d bytes, written by %s: %.2f ms in admission by policies", tc.bytes, tc.who, 1000*(secondsAfter-seconds)/(countAfter-count))
	}
}

// filled makes a Node say a lot, and returns how many bytes that is.
func (c caller) filled(t *testing.T, name string, conditions, others int) int {
	t.Helper()
	at := metav1.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	status := corev1.NodeStatus{Capacity: corev1.ResourceList{}}
	for i := range conditions {
		status.Conditions = append(status.Conditions, corev1.NodeCondition{
			Type: corev1.NodeConditionType(fmt.Sprintf("Other%d", i)), Status: corev1.ConditionFalse, Reason: "R", Message: strings.Repeat("m", 512),
			LastHeartbeatTime: at, LastTransitionTime: at,
		})
	}
	for i := range 50 { // as many as a kubelet tells of, with at most five names
		image := corev1.ContainerImage{SizeBytes: int64(i)}
		for j := range 5 {
			image.Names = append(image.Names, fmt.Sprintf("registry.example.com/some/team/image-%d@sha256:%064d", i, j))
		}
		status.Images = append(status.Images, image)
	}
	labels, annotations := map[string]string{}, map[string]string{}
	for i := range others {
		volume := corev1.UniqueVolumeName(fmt.Sprintf("kubernetes.io/csi/example.com^%0100d", i))
		status.VolumesInUse = append(status.VolumesInUse, volume)
		status.VolumesAttached = append(status.VolumesAttached, corev1.AttachedVolume{Name: volume})
		status.Capacity[corev1.ResourceName(fmt.Sprintf("example.com/device-%d", i))] = resource.MustParse("8")
		labels[fmt.Sprintf("example.com/label-%d", i)] = "true"
		annotations[fmt.Sprintf("example.com/annotation-%d", i)] = strings.Repeat("a", 900)
	}
	patch := marshal(t, map[string]any{"metadata": map[string]any{"labels": labels, "annotations": annotations}, "status": status})
	if code, _, message := c.do(t, http.MethodPatch, "/api/v1/nodes/"+name+"/status", mergePatch, patch); code != http.StatusOK {
		t.Fatalf("filling the node: %d %s", code, message)
	}
	return len(marshal(t, c.node(t, name)))
}

// admissions returns how many updates the API server has put before its
// ValidatingAdmissionPolicies, and the seconds that took.
func (c *cluster) admissions(t *testing.T, admin caller) (count, seconds float64) {
	t.Helper()
	_, _, text := admin.do(t, http.MethodGet, "/metrics", "", "")
	for name, into := range map[string]*float64{"count": &count, "sum": &seconds} {
		const labels = `{name="ValidatingAdmissionPolicy",operation="UPDATE",rejected="false",type="validate"} `
		_, value, ok := strings.Cut(text, "apiserver_admission_controller_admission_duration_seconds_"+name+labels)
		value, _, _ = strings.Cut(value, "\n")
		var err error
		if *into, err = strconv.ParseFloat(value, 64); !ok || err != nil {
			t.Fatalf("no %s of the time in admission: %v", name, err)
		}
	}
	return count, seconds
}
