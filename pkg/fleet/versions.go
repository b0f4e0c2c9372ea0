package fleet

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/util/version"
)

// APIServer is one of the cluster's, asked directly.
type APIServer struct {
	// Address is the endpoint's, "host:port".
	Address string
	// Version is its gitVersion.
	Version string
	// Hashes are the storage version hashes of its resources, by
	// "group/resource" ("resource" alone in the core group).
	Hashes map[string]string
	// Err says why it could not be asked.
	Err error
}

// reached are the ones that answered; the others are named with their reason.
func reached(servers []APIServer) (ok []APIServer, not []string) {
	for _, s := range servers {
		if s.Err != nil {
			not = append(not, fmt.Sprintf("the API server at %s: %v", s.Address, s.Err))
			continue
		}
		ok = append(ok, s)
	}
	return ok, not
}

// CheckAPIServers: all have one version. Seen is the version behind the
// kubeconfig's address.
func CheckAPIServers(servers []APIServer, seen string) Check {
	c := Check{Name: "api-servers"}
	ok, not := reached(servers)
	c.NotChecked = not
	by := map[string][]string{}
	if seen != "" {
		by[seen] = append(by[seen], "the kubeconfig's address")
	}
	for _, s := range ok {
		by[s.Version] = append(by[s.Version], s.Address)
	}
	if len(by) > 1 {
		var each []string
		for _, v := range slices.Sorted(maps.Keys(by)) {
			each = append(each, v+" ("+few(by[v], 5)+")")
		}
		c.find("kube-apiserver", "versions are mixed: "+strings.Join(each, "; "),
			"bring every API server to one version before the next upgrade begins")
	}
	if len(servers) == 0 {
		c.NotChecked = append(c.NotChecked, "the EndpointSlice default/kubernetes names no API server")
	}
	return c.done(fmt.Sprintf("%d of %d asked directly, %s", len(ok), len(servers), strings.Join(slices.Sorted(maps.Keys(by)), ", ")))
}

// hashNote is what a hash is worth.
const hashNote = "a storage version hash tells in which version an API server writes from now on, not which versions are stored"

// CheckStorageHashes: no two API servers write a resource in different versions.
func CheckStorageHashes(servers []APIServer) Check {
	c := Check{Name: "storage-hashes", Notes: []string{hashNote}}
	ok, not := reached(servers)
	c.NotChecked = not
	if len(servers) == 0 {
		c.NotChecked = append(c.NotChecked, "the EndpointSlice default/kubernetes names no API server")
	}
	resources := map[string]bool{}
	for _, s := range ok {
		for r := range s.Hashes {
			resources[r] = true
		}
	}
	for _, r := range slices.Sorted(maps.Keys(resources)) {
		by := map[string][]string{}
		for _, s := range ok {
			// One that does not serve the resource is a matter of its version.
			if h := s.Hashes[r]; h != "" {
				by[h] = append(by[h], s.Address)
			}
		}
		if len(by) < 2 {
			continue
		}
		var each []string
		for _, h := range slices.Sorted(maps.Keys(by)) {
			each = append(each, h+" at "+few(by[h], 5))
		}
		c.find(r, "API servers write it in different versions: "+strings.Join(each, ", "),
			"bring every API server to one version and one --runtime-config, then check again")
	}
	switch {
	case len(ok) == 0:
		return c.done("")
	case len(ok) == 1 && len(servers) == 1:
		return c.done("one API server: nothing to compare")
	case len(ok) == 1:
		return c.done("only one API server answered: nothing to compare")
	}
	return c.done(fmt.Sprintf("%d resources have the same hash at %d API servers", len(resources), len(ok)))
}

// CheckSkew holds the kubelets against the version skew policy
// (kubernetes.io/releases/version-skew-policy): not newer than any API server,
// at most three minors older than the newest, two if older than 1.25; now, and
// when the API servers are of the target minor.
func CheckSkew(nodes []corev1.Node, servers []string, target string) (Check, error) {
	c := Check{Name: "kubelet-skew"}
	goal, err := version.ParseGeneric(target)
	if err != nil {
		return c, fmt.Errorf("the target version: %w", err)
	}
	var oldest, newest *version.Version
	for _, text := range servers {
		v, err := version.ParseGeneric(text)
		if err != nil {
			c.NotChecked = append(c.NotChecked, fmt.Sprintf("the API server's version %q: %v", text, err))
			continue
		}
		if oldest == nil || v.LessThan(oldest) {
			oldest = v
		}
		if newest == nil || newest.LessThan(v) {
			newest = v
		}
	}
	if oldest == nil {
		return c.done(""), nil
	}
	if goal.Major() != newest.Major() || goal.Minor() > newest.Minor()+1 || goal.Minor() < newest.Minor() {
		c.find("target "+target, fmt.Sprintf("API servers of %s can be upgraded one minor at a time", newest),
			fmt.Sprintf("kubectl hygiene upgrade-check --to %d.%d", newest.Major(), newest.Minor()+1))
	}
	by := map[string][]string{}
	for _, n := range nodes {
		by[n.Status.NodeInfo.KubeletVersion] = append(by[n.Status.NodeInfo.KubeletVersion], n.Name)
	}
	for _, text := range slices.Sorted(maps.Keys(by)) {
		on := few(by[text], 10)
		v, err := version.ParseGeneric(text)
		if err != nil {
			c.NotChecked = append(c.NotChecked, fmt.Sprintf("the kubelet's version %q on %s", text, on))
			continue
		}
		allowed := 3
		if v.Minor() < 25 {
			allowed = 2
		}
		behind := func(server *version.Version) int { return int(server.Minor()) - int(v.Minor()) }
		look := "kubectl get nodes -o wide"
		switch {
		case v.Major() != newest.Major():
			c.find("kubelet "+text, "is of another major than the API server, on "+on, look)
		case behind(oldest) < 0:
			c.find("kubelet "+text, fmt.Sprintf("is newer than an API server (%s), which is not supported, on %s", oldest, on), "upgrade the API servers first", look)
		case behind(newest) > allowed:
			c.find("kubelet "+text, fmt.Sprintf("is %d minors older than the API server (%s), %d are supported, on %s", behind(newest), newest, allowed, on), "upgrade these kubelets now, one minor after the other", look)
		case behind(goal) > allowed:
			c.find("kubelet "+text, fmt.Sprintf("would be %d minors older than an API server of %s, %d are supported, on %s", behind(goal), target, allowed, on), "upgrade these kubelets before the API servers", look)
		}
	}
	return c.done(fmt.Sprintf("%s with API servers of %s, and of %s", strings.Join(slices.Sorted(maps.Keys(by)), ", "), newest, target)), nil
}

// DeprecatedAPI is a deprecated resource that some client has asked an API
// server for since it was started.
type DeprecatedAPI struct {
	Group, Version, Resource, Subresource string
	// Removed is the minor without it, "" when that is not decided.
	Removed string
}

const deprecatedMetric = "apiserver_requested_deprecated_apis"

// DeprecatedAPIs reads an API server's metrics page.
func DeprecatedAPIs(page io.Reader) ([]DeprecatedAPI, error) {
	samples, err := sample(page, deprecatedMetric, func(name string) bool { return name == deprecatedMetric })
	if err != nil {
		return nil, err
	}
	var out []DeprecatedAPI
	for _, s := range samples {
		if s.Value == 0 {
			continue
		}
		m := s.Metric
		out = append(out, DeprecatedAPI{string(m["group"]), string(m["version"]), string(m["resource"]), string(m["subresource"]), string(m["removed_release"])})
	}
	return out, nil
}

// Metrics is what one API server's metrics say.
type Metrics struct {
	Address string
	APIs    []DeprecatedAPI
	Err     error
}

// CheckDeprecated: no client asks for what the target does not serve any more.
func CheckDeprecated(pages []Metrics, target string) Check {
	c := Check{Name: "deprecated-apis", Notes: []string{"an API server knows of requests since its own start only"}}
	goal, err := version.ParseGeneric(target)
	if err != nil {
		return Failed(c.Name, fmt.Errorf("the target version: %w", err))
	}
	asked := map[DeprecatedAPI][]string{}
	for _, p := range pages {
		if p.Err != nil {
			c.NotChecked = append(c.NotChecked, fmt.Sprintf("/metrics of %s: %v", p.Address, p.Err))
			continue
		}
		for _, a := range p.APIs {
			asked[a] = append(asked[a], p.Address)
		}
	}
	if len(pages) == 0 {
		c.NotChecked = append(c.NotChecked, "no API server could be asked for its /metrics")
	}
	name := func(a DeprecatedAPI) string {
		gv := strings.TrimPrefix(a.Group+"/"+a.Version, "/")
		return strings.TrimSuffix(gv+" "+a.Resource+"/"+a.Subresource, "/")
	}
	apis := slices.SortedFunc(maps.Keys(asked), func(a, b DeprecatedAPI) int { return strings.Compare(name(a), name(b)) })
	for _, a := range apis {
		removed, err := version.ParseGeneric(a.Removed)
		if err == nil && !goal.LessThan(removed) {
			c.find(name(a), fmt.Sprintf("is asked for by some client, and gone in %s", a.Removed),
				"find the client in the API server's audit log (annotation k8s.io/deprecated: \"true\") and move it to the newer version",
				"kubectl get --raw /metrics | grep "+deprecatedMetric)
			continue
		}
		when := "no release without it is decided"
		if a.Removed != "" {
			when = "gone in " + a.Removed
		}
		c.Notes = append(c.Notes, fmt.Sprintf("%s is asked for by some client; %s", name(a), when))
	}
	return c.done(fmt.Sprintf("no client asks for what %s does not serve", target))
}
