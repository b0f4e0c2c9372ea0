module github.com/hosthygiene/agent/hack/monitoring

go 1.26.0

require (
	github.com/grafana/grafana-foundation-sdk/go v0.0.12
	sigs.k8s.io/yaml v1.6.0
)

require go.yaml.in/yaml/v2 v2.4.2 // indirect
