package fleet

import (
	"bufio"
	"bytes"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/prometheus/common/expfmt"
	"github.com/prometheus/common/model"
	corev1 "k8s.io/api/core/v1"
	storagev1 "k8s.io/api/storage/v1"
)

// Duplicate is one identity that several nodes have.
type Duplicate struct {
	// Identity is what kind it is: "machine-id", "product UUID",
	// "iscsi_initiator".
	Identity string `json:"identity"`
	// Hash is the first 12 hex digits of the SHA-256 of the value.
	Hash  string   `json:"hash"`
	Nodes []string `json:"nodes"`
}

// Identities are what one node is known by, kind by kind, as hashes.
type Identities map[string]string

// Hash is how an identity is told, as the agent's metrics tell it.
func Hash(value string) string {
	sum := sha256.Sum256([]byte(value))
	return hex.EncodeToString(sum[:])[:12]
}

// IdentitiesOfNode are what the kubelet publishes: /etc/machine-id and the
// machine's UUID (DMI product_uuid).
func IdentitiesOfNode(n corev1.Node) Identities {
	ids := Identities{}
	// One UUID comes in upper or lower case, by kernel and board.
	if id := strings.ToLower(n.Status.NodeInfo.MachineID); id != "" {
		ids["machine-id"] = Hash(id)
	}
	if id := strings.ToLower(n.Status.NodeInfo.SystemUUID); id != "" {
		ids["product UUID"] = Hash(id)
	}
	return ids
}

// duplicatesOf compares what kubelets publish.
func duplicatesOf(nodes []corev1.Node) []Duplicate {
	known := map[string]Identities{}
	for _, n := range nodes {
		known[n.Name] = IdentitiesOfNode(n)
	}
	return Duplicates(known)
}

// Duplicates finds the identities that more than one node has.
func Duplicates(known map[string]Identities) []Duplicate {
	holders := map[[2]string][]string{}
	for _, node := range slices.Sorted(maps.Keys(known)) {
		for kind, hash := range known[node] {
			holders[[2]string{kind, hash}] = append(holders[[2]string{kind, hash}], node)
		}
	}
	var out []Duplicate
	for id, nodes := range holders {
		if len(nodes) > 1 {
			out = append(out, Duplicate{Identity: id[0], Hash: id[1], Nodes: nodes})
		}
	}
	slices.SortFunc(out, func(a, b Duplicate) int {
		return cmp.Or(strings.Compare(a.Identity, b.Identity), strings.Compare(a.Hash, b.Hash))
	})
	return out
}

// IdentitiesOfDrivers reads the initiator names that some CSI drivers use as the
// node's ID. Other IDs are left alone: many drivers give all nodes of a zone one.
func IdentitiesOfDrivers(n storagev1.CSINode) Identities {
	out := Identities{}
	for _, d := range n.Spec.Drivers {
		for word := range strings.FieldsFuncSeq(d.NodeID, func(r rune) bool { return strings.ContainsRune(" ,;|\"'", r) }) {
			if name := strings.ToLower(word); initiatorName(name) {
				out["initiator name in CSINode of "+d.Name] = Hash(name)
			}
		}
	}
	return out
}

// initiatorName: the three forms of RFC 7143, 4.2.7, and the NVMe Base
// Specification's qualified name.
func initiatorName(s string) bool {
	for _, form := range []string{"iqn.", "eui.", "naa.", "nqn."} {
		if rest, ok := strings.CutPrefix(s, form); ok && len(rest) >= 12 {
			return true
		}
	}
	return false
}

// IdentitiesOfMetrics reads an agent's metrics page: every hosthygiene_X_info with
// a label hash is an identity X, and a label kind says which of several. An
// identity of which a node has several is no identity.
func IdentitiesOfMetrics(page io.Reader) (Identities, error) {
	families, err := sample(page, "hosthygiene_", func(name string) bool { return strings.HasSuffix(name, "_info") })
	if err != nil {
		return nil, err
	}
	out, several := Identities{}, map[string]bool{}
	for _, s := range families {
		hash := string(s.Metric["hash"])
		if s.Value == 0 || hash == "" {
			continue
		}
		name := strings.TrimSuffix(strings.TrimPrefix(string(s.Metric[model.MetricNameLabel]), "hosthygiene_"), "_info")
		if kind := string(s.Metric["kind"]); kind != "" {
			name += " " + kind
		}
		if was, seen := out[name]; seen && was != hash {
			several[name] = true
		}
		out[name] = hash
	}
	maps.DeleteFunc(out, func(name, _ string) bool { return several[name] })
	return out, nil
}

// maxSamples bounds what is kept of one page.
const maxSamples = 10_000

// sample reads those samples of a page in the text format whose names begin with
// a prefix and that are wanted. The pages of API servers are tens of megabytes:
// every other line is passed over.
func sample(page io.Reader, prefix string, wanted func(name string) bool) (model.Vector, error) {
	var kept bytes.Buffer
	lines := bufio.NewReaderSize(page, 64<<10)
	for n := 0; ; {
		line, err := lines.ReadSlice('\n')
		// The rest of a line too long for the buffer comes as lines of its own
		// that begin with no name of ours, or are refused below.
		if bytes.HasPrefix(line, []byte(prefix)) && !errors.Is(err, bufio.ErrBufferFull) {
			name, _, _ := bytes.Cut(line, []byte("{"))
			if wanted(string(name)) {
				if n++; n > maxSamples {
					return nil, fmt.Errorf("more than %d samples of %s", maxSamples, prefix)
				}
				kept.Write(bytes.TrimRight(line, "\r\n"))
				kept.WriteByte('\n')
			}
		}
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil && !errors.Is(err, bufio.ErrBufferFull) {
			return nil, err
		}
	}
	parser := expfmt.NewTextParser(model.UTF8Validation)
	families, err := parser.TextToMetricFamilies(&kept)
	if err != nil {
		return nil, err
	}
	var out model.Vector
	for _, name := range slices.Sorted(maps.Keys(families)) {
		samples, err := expfmt.ExtractSamples(&expfmt.DecodeOptions{}, families[name])
		if err != nil {
			return nil, err
		}
		out = append(out, samples...)
	}
	return out, nil
}
