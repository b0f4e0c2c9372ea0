//go:build cluster

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"io"
	"net/url"
	"os"
	"testing"
	"time"

	"github.com/hosthygiene/agent/test/rig/rigtest"
)

const agentUser = "system:serviceaccount:host-hygiene:host-hygiene-agent"

// request is a request of the agent's, as the API server's audit log has it.
type request struct {
	Verb       string
	RequestURI string
	Stage      string
	User       struct {
		Username string
		Extra    map[string][]string
	}
	ObjectRef struct{ APIGroup, Resource, Subresource, Namespace, Name string }

	ResponseStatus           struct{ Code int }
	RequestReceivedTimestamp time.Time
}

func (r request) String() string {
	return fmt.Sprintf("%s %s %s → %d", r.RequestReceivedTimestamp.Format("15:04:05.0"), r.Verb, r.RequestURI, r.ResponseStatus.Code)
}

// from is the node the request came from, which the pod's token names.
func (r request) from() string {
	if names := r.User.Extra["authentication.kubernetes.io/node-name"]; len(names) == 1 {
		return names[0]
	}
	return ""
}

// write says whether the request asks for a change.
func (r request) write() bool {
	switch r.Verb {
	case "get", "list", "watch":
		return false
	}
	return true
}

// auditSince reads the agent's requests after an offset of the audit log, and
// returns the offset of what comes next.
func (w *world) auditSince(t *testing.T, offset int64) ([]request, int64) {
	t.Helper()
	f, err := os.Open(w.ControlPlane.AuditLog())
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.Seek(offset, io.SeekStart); err != nil {
		t.Fatal(err)
	}
	var found []request
	lines := bufio.NewReader(f)
	for {
		line, err := lines.ReadBytes('\n')
		if err == io.EOF {
			return found, offset // a line that is being written is read next time
		}
		if err != nil {
			t.Fatal(err)
		}
		offset += int64(len(line))
		var r request
		if err := json.Unmarshal(line, &r); err != nil {
			t.Fatalf("audit log: %v: %.200s", err, line)
		}
		// A watch is noted when it starts and when it ends.
		if r.User.Username == agentUser && (r.Stage == "ResponseComplete" || r.Verb == "watch" && r.Stage == "ResponseStarted") {
			found = append(found, r)
		}
	}
}

// access holds every request of the agent's to what it may and does need: the
// API server refused none, and none goes beyond its own Node.
func (w *world) access(t *testing.T) {
	requests, _ := w.auditSince(t, w.auditStart)
	if len(requests) == 0 {
		t.Fatal("the audit log has no request of the agent's")
	}
	used := map[string]int{}
	for _, r := range requests {
		if r.ResponseStatus.Code == 401 || r.ResponseStatus.Code == 403 {
			t.Errorf("refused: %s", r)
		}
		if !mayAsk(r) {
			t.Errorf("not a request the agent is there to make: %s", r)
		}
		what := r.ObjectRef.Resource
		if r.ObjectRef.Subresource != "" {
			what += "/" + r.ObjectRef.Subresource
		}
		used[r.Verb+" "+what]++
	}
	t.Logf("requests of the agent's: %v", used)
	w.Note("requests", fmt.Sprint(used))
}

func mayAsk(r request) bool {
	o := r.ObjectRef
	switch {
	case o.Resource == "nodes" && o.Subresource == "" && (r.Verb == "list" || r.Verb == "watch"):
		u, err := url.Parse(r.RequestURI)
		return err == nil && u.Query().Get("fieldSelector") == "metadata.name="+r.from()
	case o.Resource == "nodes" && o.Subresource == "" && r.Verb == "get",
		o.Resource == "nodes" && o.Subresource == "status" && r.Verb == "patch":
		return o.Name == r.from()
	case o.Resource == "events":
		return o.Namespace == "default" && (r.Verb == "create" || r.Verb == "patch")
	case o.Resource == "leases":
		return o.Namespace == rigtest.Namespace
	case o.Resource == "volumeattachments", o.Resource == "persistentvolumes":
		return r.Verb == "get"
	case o.Resource == "":
		return r.Verb == "get" && r.RequestURI == "/version"
	}
	return false
}
