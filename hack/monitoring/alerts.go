package main

import (
	"fmt"
	"strings"

	"github.com/grafana/grafana-foundation-sdk/go/cog"
	"github.com/grafana/grafana-foundation-sdk/go/cog/variants"
	"github.com/grafana/grafana-foundation-sdk/go/common"
	"github.com/grafana/grafana-foundation-sdk/go/expr"
	"github.com/grafana/grafana-foundation-sdk/go/prometheus"
	"sigs.k8s.io/yaml"
)

// ruleFile is what Prometheus reads.
type ruleFile struct {
	Groups []struct {
		Name  string `json:"name"`
		Rules []struct {
			Alert         string            `json:"alert"`
			Expr          string            `json:"expr"`
			For           string            `json:"for"`
			KeepFiringFor string            `json:"keep_firing_for"`
			Labels        map[string]string `json:"labels"`
			Annotations   map[string]string `json:"annotations"`
		} `json:"rules"`
	} `json:"groups"`
}

// provisioned is what Grafana reads below provisioning/alerting
// (grafana.com/docs, "Use configuration files to provision alerting resources").
type provisioned struct {
	APIVersion int     `json:"apiVersion"`
	Groups     []group `json:"groups"`
}

type group struct {
	OrgID    int    `json:"orgId"`
	Name     string `json:"name"`
	Folder   string `json:"folder"`
	Interval string `json:"interval"`
	Rules    []rule `json:"rules"`
}

type rule struct {
	UID           string            `json:"uid"`
	Title         string            `json:"title"`
	Condition     string            `json:"condition"`
	Data          []query           `json:"data"`
	NoDataState   string            `json:"noDataState"`
	ExecErrState  string            `json:"execErrState"`
	For           string            `json:"for,omitempty"`
	KeepFiringFor string            `json:"keepFiringFor,omitempty"`
	Resolve       int               `json:"missing_series_evals_to_resolve"`
	Labels        map[string]string `json:"labels,omitempty"`
	Annotations   map[string]string `json:"annotations"`
}

type query struct {
	RefID             string             `json:"refId"`
	DatasourceUID     string             `json:"datasourceUid"`
	RelativeTimeRange map[string]int     `json:"relativeTimeRange"`
	Model             variants.Dataquery `json:"model"`
}

const (
	// datasource is the one to replace where the data source has another uid.
	datasource  = "prometheus"
	expressions = "__expr__" // Grafana's own
)

// grafanaRules are the same alerts as Grafana evaluates them. In Prometheus any
// series that comes out of the expression is an alert, also one with value 0, and
// none is none: the math says so, as in Grafana's own import of such rules.
func grafanaRules(text []byte) ([]byte, error) {
	var file ruleFile
	if err := yaml.UnmarshalStrict(text, &file); err != nil {
		return nil, fmt.Errorf("%s: %w", alerts, err)
	}
	out := provisioned{APIVersion: 1}
	for _, g := range file.Groups {
		to := group{OrgID: 1, Name: g.Name, Folder: "Host hygiene", Interval: "1m"}
		for _, r := range g.Rules {
			data, err := queries(r.Expr)
			if err != nil {
				return nil, fmt.Errorf("%s: %w", r.Alert, err)
			}
			annotations := map[string]string{}
			for k, v := range r.Annotations {
				annotations[k] = strings.ReplaceAll(v, "$value", "$values.query.Value")
			}
			to.Rules = append(to.Rules, rule{
				UID: r.Alert, Title: r.Alert, Condition: "threshold", Data: data,
				NoDataState: "OK", ExecErrState: "Error", For: r.For, KeepFiringFor: r.KeepFiringFor, Resolve: 1,
				Labels: r.Labels, Annotations: annotations,
			})
		}
		out.Groups = append(out.Groups, to)
	}
	body, err := yaml.Marshal(out)
	return append([]byte(generated+`# For Grafana 12 or later, in provisioning/alerting. The data source's uid is "`+datasource+`";
# yours may have another.
`), body...), err
}

func queries(promql string) ([]query, error) {
	own := common.DataSourceRef{Type: cog.ToPtr(expressions), Uid: cog.ToPtr(expressions)}
	var out []query
	for _, q := range []struct {
		refID, uid string
		from       int
		model      cog.Builder[variants.Dataquery]
	}{
		{"query", datasource, 600, prometheus.NewDataqueryBuilder().RefId("query").Expr(promql).Instant().
			Datasource(common.DataSourceRef{Type: cog.ToPtr("prometheus"), Uid: cog.ToPtr(datasource)})},
		{"firing", expressions, 0, expr.NewTypeMathBuilder().RefId("firing").Datasource(own).
			Expression("is_number($query) || is_nan($query) || is_inf($query)")},
		{"threshold", expressions, 0, expr.NewTypeThresholdBuilder().RefId("threshold").Datasource(own).Expression("firing").
			Conditions([]cog.Builder[expr.ExprTypeThresholdConditions]{expr.NewExprTypeThresholdConditionsBuilder().
				Evaluator(expr.NewExprTypeThresholdConditionsEvaluatorBuilder().Type(expr.ExprTypeThresholdConditionsEvaluatorTypeGt).Params([]float64{0}))})},
	} {
		model, err := q.model.Build()
		if err != nil {
			return nil, err
		}
		out = append(out, query{q.refID, q.uid, map[string]int{"from": q.from, "to": 0}, model})
	}
	return out, nil
}
