{{- define "inference.name" -}}
{{- default .Chart.Name .Values.nameOverride | trunc 63 | trimSuffix "-" -}}
{{- end -}}

{{- define "inference.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 52 | trimSuffix "-" -}}
{{- else if contains (include "inference.name" .) .Release.Name -}}
{{- .Release.Name | trunc 52 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-%s" .Release.Name (include "inference.name" .) | trunc 52 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{- define "inference.selector" -}}
app.kubernetes.io/name: {{ include "inference.name" . }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "inference.pods" -}}
{{ include "inference.selector" . }}
app.kubernetes.io/component: server
{{- end -}}

{{- define "inference.labels" -}}
{{ include "inference.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/part-of: bit-mlops
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- define "inference.account" -}}
{{- if .Values.serviceAccount.create -}}
{{- default (include "inference.fullname" .) .Values.serviceAccount.name -}}
{{- else -}}
{{- default "default" .Values.serviceAccount.name -}}
{{- end -}}
{{- end -}}

{{- define "inference.image" -}}
{{- if .Values.image.digest -}}
{{ .Values.image.repository }}@{{ .Values.image.digest }}
{{- else -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}
{{- end -}}

{{- /* Name of the Secret that holds tenants.json; empty: open to everybody. */ -}}
{{- define "inference.keys" -}}
{{- if .Values.keys.existingSecret -}}
{{ .Values.keys.existingSecret }}
{{- else if .Values.keys.tenants -}}
{{ include "inference.fullname" . }}-keys
{{- end -}}
{{- end -}}

{{- /* Fewest pods that can be expected. */ -}}
{{- define "inference.fewest" -}}
{{- if eq .Values.autoscaling.by "none" -}}
{{ .Values.replicas }}
{{- else if and (eq .Values.autoscaling.by "keda") .Values.autoscaling.keda.zero.enabled -}}
0
{{- else -}}
{{- with .Values.autoscaling -}}
{{- if gt (int .minReplicas) (int .maxReplicas) -}}
{{- fail (printf "autoscaling.minReplicas is %d, above autoscaling.maxReplicas, %d: raise the one or lower the other" (int .minReplicas) (int .maxReplicas)) -}}
{{- end -}}
{{ .minReplicas }}
{{- end -}}
{{- end -}}
{{- end -}}

{{- /* What Prometheus calls this release's pods. */ -}}
{{- define "inference.series" -}}
namespace="{{ .Release.Namespace }}",job="{{ include "inference.fullname" . }}"
{{- end -}}

{{- define "inference.container-security" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}

{{- define "inference.pod-security" -}}
runAsNonRoot: true
runAsUser: 10001
runAsGroup: 10001
fsGroup: 10001
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "inference.behavior" -}}
scaleUp:
  stabilizationWindowSeconds: {{ .up.windowSeconds }}
  selectPolicy: Max
  policies:
    - {type: Percent, value: {{ .up.percent }}, periodSeconds: {{ .up.periodSeconds }}}
    - {type: Pods, value: {{ .up.pods }}, periodSeconds: {{ .up.periodSeconds }}}
scaleDown:
  stabilizationWindowSeconds: {{ .down.windowSeconds }}
  policies:
    - {type: Pods, value: {{ .down.pods }}, periodSeconds: {{ .down.periodSeconds }}}
{{- end -}}

{{- /* A setting as an environment variable holds it: lists as JSON, whole numbers without an exponent. */ -}}
{{- define "inference.setting" -}}
{{- if kindIs "slice" . -}}
{{ toJson . }}
{{- else if and (kindIs "float64" .) (eq . (floor .)) -}}
{{ int64 . }}
{{- else -}}
{{ . }}
{{- end -}}
{{- end -}}

{{- /* Nine tenths of a volume in MiB: over its size limit the kubelet evicts the pod. */ -}}
{{- define "inference.cache-mb" -}}
{{- $bytes := dict "M" 1e6 "G" 1e9 "T" 1e12 "Mi" 1048576.0 "Gi" 1073741824.0 "Ti" 1099511627776.0 -}}
{{- $unit := regexFind "[MGT]i?$" . -}}
{{- max 1 (divf (mulf 0.9 (trimSuffix $unit . | float64) (get $bytes $unit)) 1048576.0 | int64) -}}
{{- end -}}

{{- /* What is led to from outside: all but /metrics, which needs no key. */ -}}
{{- define "inference.paths" -}}
/: Exact
/openapi.json: Exact
/static: Prefix
/v1: Prefix
/v2: Prefix
{{- end }}
