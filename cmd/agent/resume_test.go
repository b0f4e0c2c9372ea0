package main

import (
	"bytes"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestResume(t *testing.T) {
	const failed = `{"metadata":{"name":"host-hygiene-failures","namespace":"host-hygiene","resourceVersion":"7","annotations":{
		"hosthygiene.io/failures":"3","hosthygiene.io/failed-steps":"[{\"node\":\"n1\",\"step\":\"packages\",\"time\":\"2026-11-21T23:00:00Z\",\"message\":\"E: \\u001b[31mno such package\"}]"}},"spec":{}}`
	const notFound = `{"kind":"Status","status":"Failure","reason":"NotFound","code":404,"message":"not found"}`
	const forbidden = `{"kind":"Status","status":"Failure","reason":"Forbidden","code":403,"message":"leases is forbidden"}`
	for _, tc := range []struct {
		name, lease string
		code        int
		exit        int
		want        string
		writes      int
	}{
		{"after failures", failed, 200, exitOK, "cleared 3 failed steps; remedies go on\n  packages on n1 at 2026-11-21T23:00:00Z: E: ?[31mno such package\n", 1},
		{"when nothing ever failed", notFound, 404, exitOK, "no step has failed on any node: there is nothing to clear\n", 0},
		{"without the right", forbidden, 403, exitFinding, "want a kubeconfig that may get, create and update leases", 0},
	} {
		t.Run(tc.name, func(t *testing.T) {
			writes := 0
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Content-Type", "application/json")
				if r.Method != http.MethodGet {
					writes++
					body, err := io.ReadAll(r.Body)
					if err != nil || r.URL.Path != "/apis/coordination.k8s.io/v1/namespaces/host-hygiene/leases/host-hygiene-failures" || !bytes.Contains(body, []byte(`"hosthygiene.io/failures":"0"`)) || !bytes.Contains(body, []byte(`"resourceVersion":"7"`)) {
						t.Errorf("%s %s %s %v", r.Method, r.URL.Path, body, err)
					}
				}
				w.WriteHeader(tc.code)
				io.WriteString(w, tc.lease)
			}))
			defer server.Close()
			config := filepath.Join(t.TempDir(), "kubeconfig")
			text := fmt.Sprintf("{apiVersion: v1, kind: Config, current-context: c, clusters: [{name: c, cluster: {server: %q}}], contexts: [{name: c, context: {cluster: c}}]}", server.URL)
			if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			var out bytes.Buffer
			root := newRoot(false)
			root.SetOut(&out)
			root.SetArgs([]string{"resume", "--kubeconfig", config})
			err := root.ExecuteContext(t.Context())
			if err != nil {
				fmt.Fprint(&out, err)
			}
			if code := exitCode(err); code != tc.exit || !strings.Contains(out.String(), tc.want) || writes != tc.writes {
				t.Errorf("exit %d, %d writes, output %q", code, writes, out.String())
			}
		})
	}
}
